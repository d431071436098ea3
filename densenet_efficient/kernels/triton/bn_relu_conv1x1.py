"""1x1 convolution of relu(x * scale + shift): the activation goes from registers into the tensor cores."""

import triton.language as tl
from torch import Tensor

from .activation import activate
from .launch import Tile, ceil_div, dot_precision, has_warpgroup_products, kernel, next_power_of_two, on_device
from .statistics import finish_statistics, store_statistics, tile_statistics


@kernel(do_not_specialize=["rows"])
def bn_relu_conv1x1_kernel(
    x, x_stride, scale, shift, weight, out, out_stride, partials, rows, channels, outputs,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """One tile [ROWS, OUTPUTS] of the result, and its statistics."""
    dtype = scale.dtype.element_ty
    part = tl.program_id(0)
    row = part.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    output = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    valid, wanted = (row < rows)[:, None], (output < outputs)[None, :]
    x_rows = x + row[:, None] * x_stride
    weight_rows = weight + output[None, :] * channels
    product = tl.zeros((ROWS, OUTPUTS), dtype)
    for start in range(0, channels, DEPTH):
        channel = start + tl.arange(0, DEPTH)
        within = channel < channels
        inputs = tl.load(x_rows + channel[None, :], mask=valid & within[None, :], other=0.0)
        factor = tl.load(scale + channel, mask=within, other=0.0)[None, :]
        summand = tl.load(shift + channel, mask=within, other=0.0)[None, :]
        weights = tl.load(weight_rows + channel[:, None], mask=within[:, None] & wanted, other=0.0)
        activation = activate(inputs, factor, summand, x.dtype.element_ty)
        product = tl.dot(activation, weights, product, input_precision=PRECISION, out_dtype=dtype)
    stored = product.to(out.dtype.element_ty)
    tl.store(out + row[:, None] * out_stride + output[None, :], stored, mask=valid & wanted)
    if partials is not None:
        count = tl.minimum(rows - part.to(tl.int64) * ROWS, ROWS).to(dtype)
        mean, m2 = tile_statistics(stored.to(dtype), valid, count)
        store_statistics(partials, part, tl.num_programs(0), outputs, output, count, mean, m2)


def _tile(x: Tensor, outputs: int, precision: str) -> Tile:
    """As many rows as leave two programs to a multiprocessor, for each reads the whole weight."""
    columns = min(max(next_power_of_two(outputs), 16), 128)
    few_rows = x.shape[0] < 2**15
    if x.dtype.itemsize == 2 and has_warpgroup_products(x.device):
        return Tile(64, columns, 64, warps=4, stages=3) if few_rows else Tile(128, columns, 64, 8, 3, registers=128)
    if x.dtype.itemsize == 2:
        return Tile(64, columns, 32, warps=4, stages=4) if few_rows else Tile(128, columns, 32, 8, 4)
    if precision == "tf32":
        return Tile(128, columns, 32, warps=8, stages=3)
    if x.dtype.itemsize == 4:
        return Tile(64, min(columns, 64), 16, warps=4, stages=2)
    return Tile(64, min(columns, 64), 16, warps=8, stages=2)


def bn_relu_conv1x1(
    x: Tensor,  # [M, C]
    scale: Tensor,  # [C]
    shift: Tensor,  # [C]
    weight: Tensor,  # [K, C, 1, 1]
    out: Tensor,  # [M, K]
    mean: Tensor | None,  # [K]
    variance: Tensor | None,  # [K]
) -> None:
    """out = relu(x * scale + shift) @ weight^T, and the statistics of ``out`` as stored."""
    (rows, channels), outputs = x.shape, out.shape[1]
    precision = dot_precision(x.dtype)
    tile = _tile(x, outputs, precision)
    grid = ceil_div(rows, tile.rows), ceil_div(outputs, tile.columns)
    partials = None if mean is None else mean.new_empty(3, grid[0], outputs)
    with on_device(x):
        bn_relu_conv1x1_kernel[grid](
            x, x.stride(0), scale, shift, weight.flatten(1).to(x.dtype).contiguous(), out, out.stride(0), partials,
            rows, channels, outputs, precision, tile.rows, tile.columns, tile.depth,
            **tile.options(),
        )  # fmt: skip
    if partials is not None and mean is not None and variance is not None:
        finish_statistics(partials, mean, variance)
