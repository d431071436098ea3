"""3x3 convolution of relu(x * scale + shift): one activation, in registers, serves the three taps of an image line."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activation import activate
from .launch import Tile, dot_precision, on_device
from .statistics import finish_statistics, store_statistics, tile_statistics


@triton.jit(do_not_specialize=["rows", "height", "width"])
def _kernel(
    x, x_stride, scale, shift, weight, out, out_stride, partials, rows, height, width, channels, outputs,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """ROWS - 2 pixels of the result, and their statistics.

    Every pixel of the tile is multiplied with the three taps of a line; the products of the left and right tap belong
    to its neighbours, and move there once, at the end. So the tile has one pixel more at either end.
    """
    dtype = scale.dtype.element_ty
    part = tl.program_id(0)
    first = part.to(tl.int64) * (ROWS - 2)
    pixel = tl.arange(0, ROWS)
    row = first - 1 + pixel
    in_image = ((first + height * width - 1) % (height * width)).to(tl.int32) + pixel
    line, column = in_image // width % height, in_image % width
    output = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    wanted = (output < outputs)[None, :]
    valid = (row >= 0) & (row < rows)

    left = tl.zeros((ROWS, OUTPUTS), dtype)
    centre = tl.zeros((ROWS, OUTPUTS), dtype)
    right = tl.zeros((ROWS, OUTPUTS), dtype)
    chunks = tl.cdiv(channels, DEPTH)
    for step in range(0, 3 * chunks):
        vertical = step // chunks
        channel = step % chunks * DEPTH + tl.arange(0, DEPTH)
        within = channel < channels
        source_line = line + vertical - 1
        inside = (valid & (source_line >= 0) & (source_line < height))[:, None]
        place = (row + (vertical - 1) * width)[:, None] * x_stride + channel[None, :]
        inputs = tl.load(x + place, mask=inside & within[None, :], other=0.0)
        factor = tl.load(scale + channel, mask=within, other=0.0)[None, :]
        summand = tl.load(shift + channel, mask=within, other=0.0)[None, :]
        activation = tl.where(inside, activate(inputs, factor, summand, x.dtype.element_ty), 0.0)

        taps = weight + (vertical * 3 * outputs + output[None, :]) * channels + channel[:, None]
        exists = within[:, None] & wanted
        left = tl.dot(activation, tl.load(taps, mask=exists, other=0.0), left, input_precision=PRECISION, out_dtype=dtype)
        taps += outputs * channels
        centre = tl.dot(activation, tl.load(taps, mask=exists, other=0.0), centre, input_precision=PRECISION, out_dtype=dtype)
        taps += outputs * channels
        right = tl.dot(activation, tl.load(taps, mask=exists, other=0.0), right, input_precision=PRECISION, out_dtype=dtype)

    before = tl.broadcast_to(tl.maximum(pixel - 1, 0)[:, None], (ROWS, OUTPUTS))
    after = tl.broadcast_to(tl.minimum(pixel + 1, ROWS - 1)[:, None], (ROWS, OUTPUTS))
    centre += tl.where((column > 0)[:, None], tl.gather(left, before, 0), 0.0)
    centre += tl.where((column < width - 1)[:, None], tl.gather(right, after, 0), 0.0)

    valid = (valid & (pixel > 0) & (pixel < ROWS - 1))[:, None]
    stored = centre.to(out.dtype.element_ty)
    tl.store(out + row[:, None] * out_stride + output[None, :], stored, mask=valid & wanted)
    if partials is not None:
        count = tl.minimum(rows - first, ROWS - 2).to(dtype)
        mean, m2 = tile_statistics(stored.to(dtype), valid, count)
        store_statistics(partials, part, tl.num_programs(0), outputs, output, count, mean, m2)


def _tile(dtype: torch.dtype, precision: str, outputs: int) -> Tile:
    columns = min(max(triton.next_power_of_2(outputs), 16), 64)
    if dtype.itemsize == 2:
        return Tile(128, columns, 64, warps=8, stages=3 if columns < 64 else 2)
    if precision == "tf32":
        return Tile(128, columns, 32, warps=8, stages=2)
    return Tile(64, min(columns, 32), 16, warps=8, stages=2)


def bn_relu_conv3x3(
    x: Tensor,  # [M, C]
    scale: Tensor,  # [C]
    shift: Tensor,  # [C]
    weight: Tensor,  # [K, C, 3, 3]
    height: int,
    width: int,
    out: Tensor,  # [M, K]
    mean: Tensor | None,  # [K]
    variance: Tensor | None,  # [K]
) -> None:
    """out = conv3x3(relu(x * scale + shift)), zero padding after the ReLU, and the statistics of ``out`` as stored."""
    (rows, channels), outputs = x.shape, out.shape[1]
    precision = dot_precision(x.dtype)
    tile = _tile(x.dtype, precision, outputs)
    grid = triton.cdiv(rows, tile.rows - 2), triton.cdiv(outputs, tile.columns)
    partials = None if mean is None else mean.new_empty(3, grid[0], outputs)
    taps = weight.new_empty(3, 3, outputs, channels, dtype=x.dtype).copy_(weight.permute(2, 3, 0, 1))
    with on_device(x):
        _kernel[grid](
            x, x.stride(0), scale, shift, taps, out, out.stride(0), partials,
            rows, height, width, channels, outputs, precision, tile.rows, tile.columns, tile.depth,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    if partials is not None and mean is not None and variance is not None:
        finish_statistics(partials, mean, variance)
