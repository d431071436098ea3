"""Backward of the 1x1 convolution as two matrix products, each a pass over the storage: for any dtype and any K."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activation import activate, deposit, mask_gradient, project
from .blocks import block_and_part
from .launch import Tile, ceil_div, dot_precision, grid_of, kernel, multiprocessors, on_device, programs_per_block
from .statistics import finish_sums, store_sums, sum_parts


@triton.jit
def _finished(out_grad, out_grad_stride, out, out_stride, out_mean, out_slope, out_offset, row, output, exists, wanted):
    """The gradient of a tile of ``out``, behind the batch norm that follows it, in the dtype of ``out_mean``."""
    gradient = tl.load(out_grad + row[:, None] * out_grad_stride + output[None, :], mask=exists, other=0.0)
    value = tl.load(out + row[:, None] * out_stride + output[None, :], mask=exists, other=0.0)
    mean = tl.load(out_mean + output, mask=wanted, other=0.0)[None, :]
    slope = tl.load(out_slope + output, mask=wanted, other=0.0)[None, :]
    offset = tl.load(out_offset + output, mask=wanted, other=0.0)[None, :]
    return project(gradient, value, mean, slope, offset)


@kernel(do_not_specialize=["rows"])
def bn_relu_conv1x1_backward_input_kernel(
    out_grad, out_grad_stride, out, out_stride, out_mean, out_slope, out_offset,
    x, x_stride, mean, scale, shift, weight, weight_stride_output, weight_stride_channel,
    grad, grad_stride, sum_partials, rows, channels, outputs,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """One tile [ROWS, CHANNELS] of the input's gradient: its sums, and its deposit in ``grad``."""
    dtype = scale.dtype.element_ty
    block, part = block_and_part(channels, CHANNELS)
    row = part.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = block * CHANNELS + tl.arange(0, CHANNELS)
    valid, present = (row < rows)[:, None], channel < channels
    gradient = tl.zeros((ROWS, CHANNELS), dtype)
    for start in range(0, outputs, DEPTH):
        output = start + tl.arange(0, DEPTH)
        wanted = output < outputs
        finished = _finished(
            out_grad, out_grad_stride, out, out_stride, out_mean, out_slope, out_offset,
            row, output, valid & wanted[None, :], wanted,
        ).to(x.dtype.element_ty)  # fmt: skip
        weights = tl.load(
            weight + output[:, None] * weight_stride_output + channel[None, :] * weight_stride_channel,
            mask=wanted[:, None] & present[None, :], other=0.0,
        )  # fmt: skip
        gradient = tl.dot(finished, weights, gradient, input_precision=PRECISION, out_dtype=dtype)
    factor = tl.load(scale + channel, mask=present, other=0.0)[None, :]
    summand = tl.load(shift + channel, mask=present, other=0.0)[None, :]
    centre = tl.load(mean + channel, mask=present, other=0.0)[None, :]
    inside = valid & present[None, :]
    inputs = tl.load(x + row[:, None] * x_stride + channel[None, :], mask=inside, other=0.0)
    gradient = tl.where(valid, mask_gradient(gradient, activate(inputs, factor, summand, inputs.dtype)), 0.0)
    sum_grad_x = tl.sum(gradient * (inputs.to(dtype) - centre), 0)
    store_sums(sum_partials, part, tl.cdiv(rows, ROWS), channels, channel, tl.sum(gradient, 0), sum_grad_x)
    if grad is not None:
        deposit(grad, row[:, None] * grad_stride + channel[None, :], gradient, factor, inside, True)


@kernel(do_not_specialize=["rows"])
def bn_relu_conv1x1_backward_weight_kernel(
    out_grad, out_grad_stride, out, out_stride, out_mean, out_slope, out_offset,
    x, x_stride, scale, shift, weight_partials, rows, channels, outputs,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr, OUTPUTS: tl.constexpr,
):  # fmt: skip
    """A block [OUTPUTS, CHANNELS] of the weight's gradient over every parts-th tile of rows."""
    dtype = scale.dtype.element_ty
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    output = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    part, parts = tl.program_id(2), tl.num_programs(2)
    present, wanted = channel < channels, output < outputs
    factor = tl.load(scale + channel, mask=present, other=0.0)[None, :]
    summand = tl.load(shift + channel, mask=present, other=0.0)[None, :]
    grad_weight = tl.zeros((OUTPUTS, CHANNELS), dtype)
    for tile in range(part, tl.cdiv(rows, ROWS), parts):
        row = tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS)
        valid = (row < rows)[:, None]
        exists = valid & wanted[None, :]
        finished = _finished(
            out_grad, out_grad_stride, out, out_stride, out_mean, out_slope, out_offset, row, output, exists, wanted
        )
        finished = tl.where(exists, finished, 0.0).to(x.dtype.element_ty)
        inputs = tl.load(x + row[:, None] * x_stride + channel[None, :], mask=valid & present[None, :], other=0.0)
        activation = activate(inputs, factor, summand, inputs.dtype)
        grad_weight = tl.dot(tl.trans(finished), activation, grad_weight, input_precision=PRECISION, out_dtype=dtype)
    place = weight_partials + (part.to(tl.int64) * outputs + output[:, None]) * channels + channel[None, :]
    tl.store(place, grad_weight, mask=wanted[:, None] & present[None, :])


def _input_tile(dtype: torch.dtype, precision: str) -> Tile:
    if dtype.itemsize == 2 or precision == "tf32":
        return Tile(64, 128, 32, warps=8, stages=2)
    return Tile(32, 32, 16, warps=4, stages=2)


def _weight_tile(dtype: torch.dtype, precision: str) -> Tile:
    """Its rows are a block of outputs, its columns a block of channels, its depth the rows of the storage."""
    if dtype.itemsize == 2:
        return Tile(128, 64, 32, warps=8, stages=2)
    if precision == "tf32":
        return Tile(64, 64, 32, warps=4, stages=2)
    return Tile(32, 32, 16, warps=4, stages=2)


def input_gradient(
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
    sum_grad: Tensor,  # [C]
    sum_grad_x: Tensor,  # [C]
) -> None:
    """The sums, and ``grad += scale * masked gradient``."""
    (rows, channels), outputs = x.shape, out.shape[1]
    precision = dot_precision(x.dtype)
    tile = _input_tile(x.dtype, precision)
    if precision == "tf32":
        weight = weight.t().contiguous().t()  # whose tensor cores want the outputs side by side
    parts = ceil_div(rows, tile.rows)
    partials = sum_grad.new_empty(2, parts, channels)
    with on_device(x):
        bn_relu_conv1x1_backward_input_kernel[grid_of(parts, channels, tile.columns)](
            out_grad, out_grad.stride(0), out, out.stride(0), out_mean, out_slope, out_offset,
            x, x.stride(0), mean, scale, shift, weight, *weight.stride(),
            grad, 0 if grad is None else grad.stride(0), partials, rows, channels, outputs,
            precision, tile.rows, tile.columns, tile.depth, **tile.options(),
        )  # fmt: skip
    finish_sums(partials, sum_grad, sum_grad_x)


def weight_gradient(
    out_grad: Tensor,  # [M, K]
    out: Tensor,  # [M, K]
    out_mean: Tensor,  # [K]
    out_slope: Tensor,  # [K]
    out_offset: Tensor,  # [K]
    x: Tensor,  # [M, C]
    scale: Tensor,  # [C]
    shift: Tensor,  # [C]
    grad_weight: Tensor,  # [K, C]
) -> None:
    """grad_weight = finished gradient^T @ relu(x * scale + shift), split over the rows."""
    rows, channels = x.shape
    outputs = out.shape[1]
    precision = dot_precision(x.dtype)
    tile = _weight_tile(x.dtype, precision)
    blocks = ceil_div(channels, tile.columns), ceil_div(outputs, tile.rows)
    parts = programs_per_block(rows, tile.depth, blocks[0] * blocks[1], 2 * multiprocessors(x.device))
    partials = grad_weight.new_empty(parts, outputs, channels)
    grid = (*blocks, parts)
    with on_device(x):
        bn_relu_conv1x1_backward_weight_kernel[grid](
            out_grad, out_grad.stride(0), out, out.stride(0), out_mean, out_slope, out_offset,
            x, x.stride(0), scale, shift, partials, rows, channels, outputs,
            precision, tile.depth, tile.columns, tile.rows, **tile.options(),
        )  # fmt: skip
    sum_parts(partials.flatten(1), grad_weight[None])
