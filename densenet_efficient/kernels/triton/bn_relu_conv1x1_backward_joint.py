"""Backward of the 1x1 convolution in one pass over the storage, for 16-bit storage and K up to 256, on Hopper.

A program owns a block of channels and walks over its share of the rows, so that the block's weight and its part of the
weight's gradient stay on the chip. Tiles stand upright, [channels, rows]: then both products find the finished gradient
in shared memory, and the sums over rows are sums along a thread's own registers. The next tiles are loaded ahead by
hand, because the pipeliner leaves alone a load that serves more than a product.

Every block of channels reads the gradient of ``out``, so it is finished once, in place, before. Finishing it on every
load takes up to 1.9 times as long (measured on an H200).
"""

import triton.language as tl
from torch import Tensor

from .activation import activate, mask_gradient
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
from .project_gradient import project_gradient
from .statistics import sum_parts

MOST_OUTPUTS = 256
PROGRAMS = 2  # on each multiprocessor


@kernel(do_not_specialize=["rows"])
def bn_relu_conv1x1_backward_joint_kernel(
    finished, finished_stride, x, x_stride, mean, scale, shift, weight,
    grad, grad_stride, partials, rows, channels, outputs,
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
    weights = tl.load(weight + output[None, :] * channels + channel[:, None], mask=present & wanted, other=0.0)
    sum_grad, sum_grad_x = tl.zeros((CHANNELS,), dtype), tl.zeros((CHANNELS,), dtype)
    grad_weight = tl.zeros((CHANNELS, OUTPUTS), dtype)
    row = part.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    step = parts.to(tl.int64) * ROWS
    x_tile, x_step = x + row[None, :] * x_stride + channel[:, None], step * x_stride
    finished_tile, finished_step = finished + row[:, None] * finished_stride + output[None, :], step * finished_stride
    inside, exists = present & (row < rows)[None, :], (row < rows)[:, None] & wanted
    next_inputs = tl.load(x_tile, mask=inside, other=0.0)
    next_gradient = tl.load(finished_tile, mask=exists, other=0.0)
    if grad is not None:
        grad_tile, grad_step = grad + row[None, :] * grad_stride + channel[:, None], step * grad_stride
        next_before = tl.load(grad_tile, mask=inside, other=0.0)
    for _ in range(part, tl.cdiv(rows, ROWS), parts):
        inputs, out_gradient, inside_now = next_inputs, next_gradient, inside
        row += parts * ROWS
        inside, exists = present & (row < rows)[None, :], (row < rows)[:, None] & wanted
        x_tile += x_step
        next_inputs = tl.load(x_tile, mask=inside, other=0.0)
        finished_tile += finished_step
        next_gradient = tl.load(finished_tile, mask=exists, other=0.0)
        if grad is not None:
            place, before = grad_tile, next_before
            grad_tile += grad_step
            next_before = tl.load(grad_tile, mask=inside, other=0.0)
        activation = activate(inputs, factor, summand, inputs.dtype)
        gradient = tl.dot(weights, tl.trans(out_gradient), input_precision=PRECISION, out_dtype=dtype)
        gradient = mask_gradient(gradient, activation)
        sum_grad += tl.sum(gradient, 1)
        sum_grad_x += tl.sum(gradient * (inputs.to(dtype) - centre), 1)
        if grad is not None:
            tl.store(place, tl.fma(gradient, factor, before.to(dtype)).to(before.dtype), mask=inside_now)
        grad_weight = tl.dot(activation, out_gradient, grad_weight, input_precision=PRECISION, out_dtype=dtype)
    place = partials + part.to(tl.int64) * (outputs + 2) * channels + channel
    tl.store(place[:, None] + output[None, :] * channels, grad_weight, mask=present & wanted)
    tl.store(place + outputs * channels, sum_grad, mask=channel < channels)
    tl.store(place + (outputs + 1) * channels, sum_grad_x, mask=channel < channels)


def serves(x: Tensor, outputs: int) -> bool:
    """Whether the one pass compiles without spilling registers."""
    return x.dtype.itemsize == 2 and outputs <= MOST_OUTPUTS and has_warpgroup_products(x.device)


def _tile(outputs: int) -> Tile:
    """Its columns are a block of channels, its depth all outputs."""
    depth = max(next_power_of_two(outputs), 16)
    return Tile(32, 64, depth, warps=4 if depth <= 128 else 8, stages=1)


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
    sum_grad_x: Tensor,  # [C]
) -> None:
    """The weight's gradient, the sums, and ``grad += scale * masked gradient``; ``out_grad`` is left finished."""
    (rows, channels), outputs = x.shape, out.shape[1]
    project_gradient(out_grad, out, out_mean, out_slope, out_offset)
    tile = _tile(outputs)
    blocks = ceil_div(channels, tile.columns)
    parts = programs_per_block(rows, tile.rows, blocks, PROGRAMS * multiprocessors(x.device))
    partials = grad_weight.new_empty(parts, (outputs + 2) * channels)
    with on_device(x):
        bn_relu_conv1x1_backward_joint_kernel[blocks, parts](
            out_grad, out_grad.stride(0), x, x.stride(0), mean, scale, shift, weight,
            grad, 0 if grad is None else grad.stride(0), partials, rows, channels, outputs,
            dot_precision(x.dtype), tile.rows, tile.columns, tile.depth, **tile.options(),
        )  # fmt: skip
    sum_parts(partials, grad_weight[None], sum_grad, sum_grad_x)
