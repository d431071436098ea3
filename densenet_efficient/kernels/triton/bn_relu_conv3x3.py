"""3x3 convolution of relu(x * scale + shift): one activation, in registers, serves the three taps of an image line."""

import torch
import triton.language as tl
from torch import Tensor

from .activation import activate
from .launch import Tile, ceil_div, dot_precision, kernel, next_power_of_two, on_device
from .statistics import finish_statistics, store_statistics, tile_statistics
from .taps import existing_neighbours, exists_at

MANY_ROWS, MANY_ROWS_TOGETHER = 2**15, 2**13


@kernel(do_not_specialize=["rows", "height", "width"])
def bn_relu_conv3x3_kernel(
    x, x_stride, scale, shift, weight, tap_stride, output_stride, out, out_stride, partials,
    rows, height, width, channels, OUT_CHANNELS: tl.constexpr, TOGETHER: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """ROWS - 2 pixels of the result, and their statistics.

    Each pixel's activation is multiplied with the three taps of a line. The products with the left and the right tap
    belong to its neighbours, and move there once, at the end; so the tile has one pixel more at either end.
    """
    dtype = scale.dtype.element_ty
    part = tl.program_id(0)
    first = part.to(tl.int64) * (ROWS - 2)
    pixel = tl.arange(0, ROWS)
    row = first - 1 + pixel
    valid = (row >= 0) & (row < rows)
    neighbours = tl.where(valid, existing_neighbours(first + height * width - 1, height, width, ROWS), 0)
    output = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    wanted = (output < OUT_CHANNELS)[None, :]

    # Side by side, the three taps fill the tensor cores; a fourth, of zeros, makes their number a power of two.
    column = tl.arange(0, 4 * OUTPUTS)
    tap, tap_output = column // OUTPUTS, tl.program_id(1) * OUTPUTS + column % OUTPUTS
    together = tl.zeros((ROWS, 4 * OUTPUTS if TOGETHER else 1), dtype)
    left = tl.zeros((ROWS, OUTPUTS), dtype)
    centre = tl.zeros((ROWS, OUTPUTS), dtype)
    right = tl.zeros((ROWS, OUTPUTS), dtype)
    chunks = tl.cdiv(channels, DEPTH)
    for step in range(3 * chunks):
        line = step // chunks
        channel = step % chunks * DEPTH + tl.arange(0, DEPTH)
        within = channel < channels
        exists = exists_at(neighbours, 3 * line + 1)[:, None]
        place = (row + (line - 1) * width)[:, None] * x_stride + channel[None, :]
        inputs = tl.load(x + place, mask=exists & within[None, :], other=0.0)
        factor = tl.load(scale + channel, mask=within, other=0.0)[None, :]
        summand = tl.load(shift + channel, mask=within, other=0.0)[None, :]
        activation = tl.where(exists, activate(inputs, factor, summand, inputs.dtype), 0.0)

        if TOGETHER:
            taps = weight + ((3 * line + tap) * tap_stride + tap_output * output_stride)[None, :] + channel[:, None]
            present = within[:, None] & ((tap < 3) & (tap_output < OUT_CHANNELS))[None, :]
            weights = tl.load(taps, mask=present, other=0.0)
            together = tl.dot(activation, weights, together, input_precision=PRECISION, out_dtype=dtype)
        else:
            taps = weight + (3 * line * tap_stride + output * output_stride)[None, :] + channel[:, None]
            present = within[:, None] & wanted
            weights = tl.load(taps, mask=present, other=0.0)
            left = tl.dot(activation, weights, left, input_precision=PRECISION, out_dtype=dtype)
            weights = tl.load(taps + tap_stride, mask=present, other=0.0)
            centre = tl.dot(activation, weights, centre, input_precision=PRECISION, out_dtype=dtype)
            weights = tl.load(taps + 2 * tap_stride, mask=present, other=0.0)
            right = tl.dot(activation, weights, right, input_precision=PRECISION, out_dtype=dtype)
    if TOGETHER:
        by_tap = tl.reshape(tl.permute(tl.reshape(together, (ROWS, 4, OUTPUTS)), (0, 2, 1)), (ROWS, OUTPUTS, 2, 2))
        even, odd = tl.split(by_tap)
        left, right = tl.split(even)
        centre, _ = tl.split(odd)

    before = tl.broadcast_to(tl.maximum(pixel - 1, 0)[:, None], (ROWS, OUTPUTS))
    after = tl.broadcast_to(tl.minimum(pixel + 1, ROWS - 1)[:, None], (ROWS, OUTPUTS))
    result = centre + tl.where(exists_at(neighbours, 3)[:, None], tl.gather(left, before, 0), 0.0)
    result += tl.where(exists_at(neighbours, 5)[:, None], tl.gather(right, after, 0), 0.0)

    own = (valid & (pixel > 0) & (pixel < ROWS - 1))[:, None]
    stored = result.to(out.dtype.element_ty)
    tl.store(out + row[:, None] * out_stride + output[None, :], stored, mask=own & wanted)
    if partials is not None:
        count = tl.minimum(rows - first, ROWS - 2).to(dtype)
        mean, m2 = tile_statistics(stored.to(dtype), own, count)
        store_statistics(partials, part, tl.num_programs(0), OUT_CHANNELS, output, count, mean, m2)


def _is_together(x: Tensor, columns: int) -> bool:
    """Whether a line's three taps are one product, of four times ``columns``: more do not fit into the registers."""
    return x.dtype.itemsize == 2 and columns == 32


def _tile(x: Tensor, outputs: int, precision: str) -> Tile:
    """One stage, where rows are many: a line is read for three taps above each other, two times from the L1 cache."""
    columns = min(max(next_power_of_two(outputs), 16), 64)
    depth = 128 // x.dtype.itemsize // (1 if columns < 64 else 2)
    if _is_together(x, columns):
        return Tile(128 if x.shape[0] >= MANY_ROWS_TOGETHER else 64, columns, depth, warps=4, stages=1)
    if x.dtype.itemsize == 2:
        rows, stages = (128, 1) if x.shape[0] >= MANY_ROWS else (64, 3)
        return Tile(rows, columns, depth, warps=8, stages=stages)
    if precision == "tf32":
        return Tile(128, columns, depth, warps=8, stages=1)
    return Tile(64, min(columns, 32), 32, warps=8, stages=1)


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
    tile = _tile(x, outputs, precision)
    grid = ceil_div(rows, tile.rows - 2), ceil_div(outputs, tile.columns)
    partials = None if mean is None else mean.new_empty(3, grid[0], outputs)
    weight = weight.to(x.dtype).contiguous(memory_format=torch.channels_last)
    with on_device(x):
        bn_relu_conv3x3_kernel[grid](
            x, x.stride(0), scale, shift, weight, weight.stride(3), weight.stride(0), out, out.stride(0), partials,
            rows, height, width, channels, outputs,
            _is_together(x, tile.columns), precision,
            tile.rows, tile.columns, tile.depth, **tile.options(),
        )  # fmt: skip
    if partials is not None and mean is not None and variance is not None:
        finish_statistics(partials, mean, variance)
