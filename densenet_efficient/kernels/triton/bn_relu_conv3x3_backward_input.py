"""Gradient of the input of the 3x3 convolution of relu(x * scale + shift)."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activation import activate, mask_gradient
from .launch import Tile, dot_precision, on_device
from .statistics import finish_sums, store_sums
from .taps import existing_neighbours, exists_at, row_offset

MANY_ROWS = 2**15


@triton.jit(do_not_specialize=["rows", "height", "width", "blocks"])
def _kernel(
    out_grad, out_grad_stride, x, x_stride, mean, scale, shift, weight, weight_stride_pair, weight_stride_channel,
    grad, grad_stride, partials, rows, height, width, channels, blocks, OUT_CHANNELS: tl.constexpr,
    ACCUMULATE: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """One tile [ROWS, CHANNELS] of the gradient: its sums, and its deposit in ``grad``.

    The product runs over all pairs of a tap and an output; a pixel was read by the output on the tap's other side.
    """
    dtype = scale.dtype.element_ty
    part = tl.program_id(0) // blocks
    first = part.to(tl.int64) * ROWS
    row = first + tl.arange(0, ROWS)
    neighbours = tl.where(row < rows, existing_neighbours(first, height, width, ROWS), 0)[:, None]
    channel = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)
    within = channel < channels
    gradient = tl.zeros((ROWS, CHANNELS), dtype)
    out_grad_rows = out_grad + (row * out_grad_stride)[:, None]
    for start in range(0, 9 * OUT_CHANNELS, DEPTH):
        pair = start + tl.arange(0, DEPTH)
        present = pair < 9 * OUT_CHANNELS
        neighbour = 8 - pair // OUT_CHANNELS
        place = row_offset(neighbour, width).to(tl.int64) * out_grad_stride + pair % OUT_CHANNELS
        exists = exists_at(neighbours, neighbour[None, :]) & present[None, :]
        out_gradient = tl.load(out_grad_rows + place[None, :], mask=exists, other=0.0)
        weights = tl.load(
            weight + pair[:, None] * weight_stride_pair + channel[None, :] * weight_stride_channel,
            mask=present[:, None] & within[None, :], other=0.0,
        )  # fmt: skip
        gradient = tl.dot(out_gradient, weights, gradient, input_precision=PRECISION, out_dtype=dtype)

    factor = tl.load(scale + channel, mask=within, other=0.0)[None, :]
    summand = tl.load(shift + channel, mask=within, other=0.0)[None, :]
    centre = tl.load(mean + channel, mask=within, other=0.0)[None, :]
    inside = (row < rows)[:, None] & within[None, :]
    inputs = tl.load(x + row[:, None] * x_stride + channel[None, :], mask=inside, other=0.0)
    gradient = tl.where(inside, mask_gradient(gradient, activate(inputs, factor, summand, inputs.dtype)), 0.0)
    sum_grad_x = tl.sum(gradient * (inputs.to(dtype) - centre), 0)
    store_sums(partials, part, tl.cdiv(rows, ROWS), channels, channel, tl.sum(gradient, 0), sum_grad_x)
    if grad is not None:
        place = grad + row[:, None] * grad_stride + channel[None, :]
        deposit = gradient * factor
        if ACCUMULATE:
            deposit += tl.load(place, mask=inside, other=0.0).to(dtype)
        tl.store(place, deposit.to(grad.dtype.element_ty), mask=inside)


def _tile(x: Tensor) -> Tile:
    """One stage, where rows are many: a pixel's nine readers find it in the L1 cache."""
    if x.dtype.itemsize == 2 and x.shape[0] >= MANY_ROWS:
        return Tile(128, 64, 64, warps=8, stages=1, registers=128)
    if x.dtype.itemsize == 2:
        return Tile(64, 64, 64, warps=8, stages=3)
    if x.dtype.itemsize == 4:
        return Tile(128, 64, 32, warps=8, stages=2)
    return Tile(128, 32, 32, warps=8, stages=1)


def input_gradient(
    out_grad: Tensor,  # [M, K]
    x: Tensor,  # [M, C]
    mean: Tensor,  # [C]
    scale: Tensor,  # [C]
    shift: Tensor,  # [C]
    weight: Tensor,  # [K, C, 3, 3]
    height: int,
    width: int,
    grad: Tensor | None,  # [M, C]
    accumulate: bool,
    sum_grad: Tensor,  # [C]
    sum_grad_x: Tensor | None,  # [C]
) -> None:
    """The sums, and ``scale * masked gradient`` in ``grad``: assigned, or added where ``accumulate``."""
    (rows, channels), outputs = x.shape, out_grad.shape[1]
    tile = _tile(x)
    parts, blocks = triton.cdiv(rows, tile.rows), triton.cdiv(channels, tile.columns)
    partials = sum_grad.new_empty(2, parts, channels)
    matrix = _weight_by_pair_and_channel(weight, x.dtype)
    with on_device(x):
        _kernel[(parts * blocks,)](
            out_grad, out_grad.stride(0), x, x.stride(0), mean, scale, shift, matrix, *matrix.stride(),
            grad, 0 if grad is None else grad.stride(0), partials, rows, height, width, channels, blocks, outputs,
            accumulate, dot_precision(x.dtype), tile.rows, tile.columns, tile.depth, **tile.options(),
        )  # fmt: skip
    finish_sums(partials, sum_grad, sum_grad_x)


def _weight_by_pair_and_channel(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """[9 * K, C] in ``dtype``, by pair of a tap and an output. In float32 the pairs lie side by side, as tf32 wants."""
    order = (1, 2, 3, 0) if dtype == torch.float32 else (2, 3, 0, 1)
    permuted = weight.permute(order)
    packed = weight.new_empty(permuted.shape, dtype=dtype).copy_(permuted)
    return packed.flatten(1).t() if dtype == torch.float32 else packed.flatten(0, 2)
