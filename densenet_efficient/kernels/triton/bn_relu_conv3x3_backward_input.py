"""Gradient of the input of the 3x3 convolution of relu(x * scale + shift)."""

import torch
import triton.language as tl
from torch import Tensor

from .activation import activate, deposit, mask_gradient
from .blocks import block_and_part
from .launch import Tile, ceil_div, dot_precision, grid_of, has_warpgroup_products, kernel, on_device
from .statistics import finish_sums, store_sums
from .taps import existing_neighbours, exists_at, row_offset

MANY_ROWS = 2**13


@kernel(do_not_specialize=["rows", "height", "width"])
def bn_relu_conv3x3_backward_input_kernel(
    out_grad, out_grad_stride, x, x_stride, mean, scale, shift, weight, tap_stride, output_stride, channel_stride,
    grad, grad_stride, partials, rows, height, width, channels, OUT_CHANNELS: tl.constexpr,
    ACCUMULATE: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """One tile [ROWS, CHANNELS] of the gradient: its sums, and its deposit in ``grad``.

    The product runs over the taps, and the outputs of each; a pixel was read by the output on the tap's other side.
    """
    dtype = scale.dtype.element_ty
    block, part = block_and_part(channels, CHANNELS)
    first = part.to(tl.int64) * ROWS
    row = first + tl.arange(0, ROWS)
    neighbours = tl.where(row < rows, existing_neighbours(first, height, width, ROWS), 0)
    channel = block * CHANNELS + tl.arange(0, CHANNELS)
    within = channel < channels
    gradient = tl.zeros((ROWS, CHANNELS), dtype)
    chunks: tl.constexpr = (OUT_CHANNELS + DEPTH - 1) // DEPTH
    for step in range(9 * chunks):
        tap = step // chunks
        output = step % chunks * DEPTH + tl.arange(0, DEPTH)
        present = output < OUT_CHANNELS
        exists = exists_at(neighbours, 8 - tap)[:, None] & present[None, :]
        out_rows = out_grad + (row + row_offset(8 - tap, width))[:, None] * out_grad_stride
        out_gradient = tl.load(out_rows + output[None, :], mask=exists, other=0.0)
        taps = weight + tap * tap_stride + output[:, None] * output_stride + channel[None, :] * channel_stride
        weights = tl.load(taps, mask=present[:, None] & within[None, :], other=0.0)
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
        deposit(grad, row[:, None] * grad_stride + channel[None, :], gradient, factor, inside, ACCUMULATE)


def _tile(x: Tensor, outputs: int) -> Tile:
    """Its depth goes into the outputs, or they into it. Triton 3.6 spills the registers of 128 rows on Ampere."""
    depth = 16 if outputs <= 16 or 0 < outputs % 32 <= 16 else 32
    if x.dtype.itemsize == 2:
        many = x.shape[0] >= MANY_ROWS and has_warpgroup_products(x.device)
        return Tile(128 if many else 64, 64, depth, warps=4, stages=3)
    if x.dtype.itemsize == 4:
        return Tile(128, 64, depth, warps=8, stages=2)
    return Tile(128, 32, depth, warps=8, stages=1)


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
    sum_grad_x: Tensor,  # [C]
) -> None:
    """The sums, and ``scale * masked gradient`` in ``grad``: assigned, or added where ``accumulate``."""
    (rows, channels), outputs = x.shape, out_grad.shape[1]
    tile = _tile(x, outputs)
    parts = ceil_div(rows, tile.rows)
    partials = sum_grad.new_empty(2, parts, channels)
    weight, *strides = _packed(weight, x.dtype)
    with on_device(x):
        bn_relu_conv3x3_backward_input_kernel[grid_of(parts, channels, tile.columns)](
            out_grad, out_grad.stride(0), x, x.stride(0), mean, scale, shift, weight, *strides,
            grad, 0 if grad is None else grad.stride(0), partials, rows, height, width, channels, outputs,
            accumulate, dot_precision(x.dtype), tile.rows, tile.columns, tile.depth, **tile.options(),
        )  # fmt: skip
    finish_sums(partials, sum_grad, sum_grad_x)


def _packed(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, int, int, int]:
    """In ``dtype``, and its strides from tap to tap, output to output and channel to channel.

    The channels lie side by side; in float32 the outputs, as the tensor cores want them for tf32.
    """
    if dtype != torch.float32:
        weight = weight.to(dtype).contiguous(memory_format=torch.channels_last)
        return weight, weight.stride(3), weight.stride(0), 1
    outputs, channels = weight.shape[:2]
    by_channel = weight.new_empty(channels, 3, 3, outputs, dtype=dtype).copy_(weight.permute(1, 2, 3, 0))
    return by_channel, outputs, 1, 9 * outputs
