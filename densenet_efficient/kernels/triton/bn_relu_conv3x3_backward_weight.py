"""Gradient of the weight of the 3x3 convolution of relu(x * scale + shift)."""

import triton.language as tl
from torch import Tensor

from .activation import activate
from .launch import (
    Tile,
    ceil_div,
    dot_precision,
    has_warpgroup_products,
    kernel,
    multiprocessors,
    next_power_of_two,
    on_device,
    programs_per_block,
)
from .statistics import sum_parts
from .taps import existing_neighbours, exists_at, row_offset

MANY_ROWS = 2**17


@kernel(do_not_specialize=["rows", "height", "width", "parts"])
def bn_relu_conv3x3_backward_weight_kernel(
    out_grad, out_grad_stride, x, x_stride, scale, shift, partials,
    rows, height, width, channels, parts, OUT_CHANNELS: tl.constexpr,
    PRECISION: tl.constexpr, TAPS: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr, OUTPUTS: tl.constexpr,
):  # fmt: skip
    """Blocks [CHANNELS, OUTPUTS] of the gradients of TAPS taps over every parts-th tile of rows.

    One activation serves all taps: for each of them it is ``out_grad`` that is shifted and masked.
    """
    dtype = scale.dtype.element_ty
    groups: tl.constexpr = 9 // TAPS
    part, first_tap = tl.program_id(0) // groups, tl.program_id(0) % groups * TAPS
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    output = tl.program_id(2) * OUTPUTS + tl.arange(0, OUTPUTS)
    within, wanted = (channel < channels)[:, None], (output < OUT_CHANNELS)[None, :]
    factor = tl.load(scale + channel, mask=channel < channels, other=0.0)[:, None]
    summand = tl.load(shift + channel, mask=channel < channels, other=0.0)[:, None]
    sums = (tl.zeros((CHANNELS, OUTPUTS), dtype),) * TAPS
    for tile in range(part, tl.cdiv(rows, ROWS), parts):
        first = tl.cast(tile, tl.int64) * ROWS
        row = first + tl.arange(0, ROWS)
        neighbours = tl.where(row < rows, existing_neighbours(first, height, width, ROWS), 0)
        inputs = tl.load(x + row[None, :] * x_stride + channel[:, None], mask=(row < rows)[None, :] & within, other=0.0)
        activation = activate(inputs, factor, summand, inputs.dtype)
        for index in tl.static_range(TAPS):
            neighbour = 8 - (first_tap + index)
            place = (row + row_offset(neighbour, width))[:, None] * out_grad_stride + output[None, :]
            exists = exists_at(neighbours, neighbour)[:, None] & wanted
            gradient = tl.load(out_grad + place, mask=exists, other=0.0)
            total = tl.dot(activation, gradient, sums[0], input_precision=PRECISION, out_dtype=dtype)
            sums = sums[1:] + (total,)  # noqa: RUF005 (Triton knows no starred tuples)
    for index in tl.static_range(TAPS):
        tap = part.to(tl.int64) * 9 + first_tap + index
        place = partials + (tap * channels + channel[:, None]) * OUT_CHANNELS + output[None, :]
        tl.store(place, sums[index], mask=within & wanted)


def _tile(x: Tensor, outputs: int, precision: str) -> tuple[Tile, int]:
    """A tile of channels x outputs, its depth the rows of the storage; and the number of taps of a program.

    More taps read the storage less often, and leave more partial gradients to add.
    """
    columns = min(max(next_power_of_two(outputs), 16), 64)
    block = 128 if x.shape[1] > 64 and columns < 64 else 64
    if x.dtype.itemsize == 2 and x.shape[0] < MANY_ROWS and columns == 32:
        return Tile(64, columns, 64, warps=4, stages=3), 3
    if x.dtype.itemsize == 2:
        taps = 9 if has_warpgroup_products(x.device) and x.shape[0] >= MANY_ROWS else 3
        return Tile(block, columns, 64, warps=8, stages=3 if columns == 32 else 2), taps
    if precision == "tf32":
        return Tile(block, columns, 32, warps=8, stages=2), 3
    return Tile(64, min(columns, 32), 32, warps=8, stages=2 if x.dtype.itemsize == 4 else 1), 3


def weight_gradient(
    out_grad: Tensor,  # [M, K]
    x: Tensor,  # [M, C]
    scale: Tensor,  # [C]
    shift: Tensor,  # [C]
    height: int,
    width: int,
    grad_weight: Tensor,  # [K, C, 3, 3]
) -> None:
    """The sum over all pixels of ``out_grad`` times their neighbours' activations, split over the rows."""
    (rows, channels), outputs = x.shape, out_grad.shape[1]
    precision = dot_precision(x.dtype)
    tile, taps = _tile(x, outputs, precision)
    blocks, groups = (ceil_div(channels, tile.rows), ceil_div(outputs, tile.columns)), 9 // taps
    programs = multiprocessors(x.device) * (1 if taps == 9 else 2)
    parts = programs_per_block(rows, tile.depth, groups * blocks[0] * blocks[1], programs)
    partials = grad_weight.new_empty(parts, 3, 3, channels, outputs)
    grid = (parts * groups, *blocks)
    with on_device(x):
        bn_relu_conv3x3_backward_weight_kernel[grid](
            out_grad, out_grad.stride(0), x, x.stride(0), scale, shift, partials,
            rows, height, width, channels, parts, outputs,
            precision, taps, tile.depth, tile.rows, tile.columns, **tile.options(),
        )  # fmt: skip
    sum_parts(partials.flatten(1), grad_weight.permute(2, 3, 1, 0).view(9, channels, outputs))
