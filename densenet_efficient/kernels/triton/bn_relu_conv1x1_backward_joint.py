"""Backward of the 1x1 convolution in one pass over the storage, for 16-bit storage and K up to 256, on Hopper.

A program owns a block of channels and walks over its share of the rows, so that the block's weight and its part of the
weight's gradient stay on the chip. Tiles stand upright, [channels, rows]: then both products find the finished gradient
in shared memory, and the sums over rows are sums along a thread's own registers. The next tile of ``x`` is loaded ahead
by hand, because the pipeliner leaves alone a load that serves more than a product.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activation import activate, mask_gradient, project
from .launch import Tile, dot_precision, has_warpgroup_products, multiprocessors, on_device, programs_per_block
from .statistics import finish_sums, store_sums

MOST_OUTPUTS = 256


@triton.jit(do_not_specialize=["rows"])
def _kernel(
    out_grad, out_grad_stride, out, out_stride, out_mean, out_slope, out_offset,
    x, x_stride, mean, scale, shift, weight,
    grad, grad_stride, weight_partials, sum_partials, rows, channels, outputs,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr, OUTPUTS: tl.constexpr,
):  # fmt: skip
    dtype = scale.dtype.element_ty
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    output = tl.arange(0, OUTPUTS)
    part, parts = tl.program_id(1), tl.num_programs(1)
    present, wanted = (channel < channels)[:, None], (output < outputs)[None, :]
    factor = tl.load(scale + channel, mask=channel < channels, other=0.0)[:, None]
    summand = tl.load(shift + channel, mask=channel < channels, other=0.0)[:, None]
    centre = tl.load(mean + channel, mask=channel < channels, other=0.0)[:, None]
    finish_mean = tl.load(out_mean + output, mask=output < outputs, other=0.0)[None, :]
    finish_slope = tl.load(out_slope + output, mask=output < outputs, other=0.0)[None, :]
    finish_offset = tl.load(out_offset + output, mask=output < outputs, other=0.0)[None, :]
    weights = tl.load(weight + output[None, :] * channels + channel[:, None], mask=present & wanted, other=0.0)
    sum_grad, sum_grad_x = tl.zeros((CHANNELS,), dtype), tl.zeros((CHANNELS,), dtype)
    grad_weight = tl.zeros((CHANNELS, OUTPUTS), dtype)
    row = part.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    ahead = tl.load(x + row[None, :] * x_stride + channel[:, None], mask=present & (row < rows)[None, :], other=0.0)
    for _ in range(part, tl.cdiv(rows, ROWS), parts):
        inputs = ahead
        after = row + parts * ROWS
        ahead = tl.load(
            x + after[None, :] * x_stride + channel[:, None], mask=present & (after < rows)[None, :], other=0.0
        )
        inside, exists = present & (row < rows)[None, :], (row < rows)[:, None] & wanted
        if grad is not None:
            deposit = grad + row[None, :] * grad_stride + channel[:, None]
            before = tl.load(deposit, mask=inside, other=0.0)
        gradient = tl.load(out_grad + row[:, None] * out_grad_stride + output[None, :], mask=exists, other=0.0)
        value = tl.load(out + row[:, None] * out_stride + output[None, :], mask=exists, other=0.0)
        finished = project(gradient, value, finish_mean, finish_slope, finish_offset)
        finished = tl.where(exists, finished, 0.0).to(x.dtype.element_ty)
        activation = activate(inputs, factor, summand, inputs.dtype)
        gradient = tl.dot(weights, tl.trans(finished), input_precision=PRECISION, out_dtype=dtype)
        gradient = mask_gradient(gradient, activation)
        sum_grad += tl.sum(gradient, 1)
        sum_grad_x += tl.sum(gradient * (inputs.to(dtype) - centre), 1)
        if grad is not None:
            tl.store(deposit, tl.fma(gradient, factor, before.to(dtype)).to(before.dtype), mask=inside)
        grad_weight = tl.dot(activation, finished, grad_weight, input_precision=PRECISION, out_dtype=dtype)
        row = after
    place = weight_partials + (part.to(tl.int64) * outputs + output[None, :]) * channels + channel[:, None]
    tl.store(place, grad_weight, mask=present & wanted)
    store_sums(sum_partials, part, parts, channels, channel, sum_grad, sum_grad_x)


def serves(x: Tensor, outputs: int) -> bool:
    """Whether the one pass compiles without spilling registers."""
    return x.dtype.itemsize == 2 and outputs <= MOST_OUTPUTS and has_warpgroup_products(x.device)


def _tile(channels: int, outputs: int) -> Tile:
    """Its columns are a block of channels, its depth all outputs."""
    depth = max(triton.next_power_of_2(outputs), 16)
    if depth > 128:
        return Tile(32, 64, depth, warps=8, stages=1)
    return Tile(32, 64 if channels <= 64 else 128, depth, warps=8, stages=2)


def input_and_weight_gradient(
    out_grad: Tensor,  # [M, K]
    out: Tensor,  # [M, K]
    out_mean: Tensor,  # [K]
    out_slope: Tensor,  # [K]
    out_offset: Tensor,  # [K]
    x: Tensor,  # [M, C]
    mean: Tensor,  # [C]
    scale: Tensor,  # [C]
    shift: Tensor,  # [C]
    weight: Tensor,  # [K, C]
    grad: Tensor | None,  # [M, C]
    grad_weight: Tensor,  # [K, C]
    sum_grad: Tensor,  # [C]
    sum_grad_x: Tensor | None,  # [C]
) -> None:
    """The weight's gradient, the sums, and ``grad += scale * masked gradient``."""
    (rows, channels), outputs = x.shape, out.shape[1]
    tile = _tile(channels, outputs)
    blocks = triton.cdiv(channels, tile.columns)
    parts = programs_per_block(rows, tile.rows, blocks, multiprocessors(x.device))
    weight_partials = grad_weight.new_empty(parts, outputs, channels)
    sum_partials = grad_weight.new_empty(2, parts, channels)
    with on_device(x):
        _kernel[blocks, parts](
            out_grad, out_grad.stride(0), out, out.stride(0), out_mean, out_slope, out_offset,
            x, x.stride(0), mean, scale, shift, weight, grad, 0 if grad is None else grad.stride(0),
            weight_partials, sum_partials, rows, channels, outputs,
            dot_precision(x.dtype), tile.rows, tile.columns, tile.depth, **tile.options(),
        )  # fmt: skip
    torch.sum(weight_partials, 0, out=grad_weight)
    finish_sums(sum_partials, sum_grad, sum_grad_x)
