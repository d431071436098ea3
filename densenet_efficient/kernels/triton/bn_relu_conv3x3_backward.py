"""Backward of the 3x3 convolution of relu(x * scale + shift): the gradient of its input, and that of its weight."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activation import activate, mask_gradient
from .launch import Tile, dot_precision, on_device
from .statistics import finish_sums, store_sums

# How many programs share a weight's gradient: about one for each multiprocessor of a large GPU. A constant, so that the
# order of the sums depends on shapes alone.
PROGRAMS = 132
PARTS = 16
ELEMENTS = 128


@triton.jit
def _neighbours(line, column, height, width):
    """Which of the nine taps around a pixel lie within the image: bit 3 * (1 + down) + (1 + right)."""
    lines = 0b000111000 | tl.where(line > 0, 0b000000111, 0) | tl.where(line < height - 1, 0b111000000, 0)
    columns = 0b010010010 | tl.where(column > 0, 0b001001001, 0) | tl.where(column < width - 1, 0b100100100, 0)
    return lines & columns


@triton.jit
def _pixels(first, height, width, NUMBER: tl.constexpr):
    """Line and column in their image of the pixels from row ``first`` on."""
    in_image = (first % (height * width)).to(tl.int32) + tl.arange(0, NUMBER)
    return in_image // width % height, in_image % width


@triton.jit(do_not_specialize=["rows", "height", "width"])
def _input_gradient_kernel(
    out_grad, out_grad_stride, x, x_stride, mean, scale, shift, taps, pair_stride, channel_stride, grad, grad_stride, partials,
    rows, height, width, channels, outputs: tl.constexpr, ACCUMULATE: tl.constexpr,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """One tile [ROWS, CHANNELS] of the input's gradient, masked, and its sums.

    The product runs over all pairs of a tap and an output channel; a tap reads ``out_grad`` on its other side.
    """
    dtype = scale.dtype.element_ty
    part = tl.program_id(0)
    first = part.to(tl.int64) * ROWS
    row = first + tl.arange(0, ROWS)
    line, column = _pixels(first, height, width, ROWS)
    neighbours = tl.where(row < rows, _neighbours(line, column, height, width), 0)[:, None]
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    within = (channel < channels)[None, :]
    product = tl.zeros((ROWS, CHANNELS), dtype)
    row_place = (row * out_grad_stride)[:, None]
    for start in range(0, 9 * outputs, DEPTH):
        pair = start + tl.arange(0, DEPTH)
        tap, output = pair // outputs, pair % outputs
        neighbour = (1 - tap // 3) * width + 1 - tap % 3
        exists = ((neighbours >> (8 - tap)[None, :]) & 1) != 0
        place = row_place + (neighbour.to(tl.int64) * out_grad_stride + output)[None, :]
        gradient = tl.load(out_grad + place, mask=exists & (pair < 9 * outputs)[None, :], other=0.0)
        place = pair[:, None] * pair_stride + channel[None, :] * channel_stride
        weight = tl.load(taps + place, mask=(pair < 9 * outputs)[:, None] & within, other=0.0)
        product = tl.dot(gradient, weight, product, input_precision=PRECISION, out_dtype=dtype)

    valid = (row < rows)[:, None] & within
    inputs = tl.load(x + (row * x_stride)[:, None] + channel[None, :], mask=valid, other=0.0)
    factor = tl.load(scale + channel, mask=channel < channels, other=0.0)[None, :]
    summand = tl.load(shift + channel, mask=channel < channels, other=0.0)[None, :]
    centre = tl.load(mean + channel, mask=channel < channels, other=0.0)[None, :]
    masked = mask_gradient(product, activate(inputs, factor, summand, x.dtype.element_ty))
    masked = tl.where(valid, masked, 0.0)
    centred = inputs.to(dtype) - centre
    store_sums(
        partials, part, tl.num_programs(0), channels, channel, tl.sum(masked, 0), tl.sum(masked * centred, 0)
    )
    if grad is not None:
        place = grad + (row * grad_stride)[:, None] + channel[None, :]
        scaled = masked * factor
        if ACCUMULATE:
            scaled += tl.load(place, mask=valid, other=0.0).to(dtype)
        tl.store(place, scaled.to(grad.dtype.element_ty), mask=valid)


@triton.jit(do_not_specialize=["rows", "height", "width", "steps"])
def _weight_gradient_kernel(
    out_grad, out_grad_stride, x, x_stride, scale, shift, partials,
    rows, steps, height, width, channels, outputs,
    PRECISION: tl.constexpr, TAPS: tl.constexpr, CHANNELS: tl.constexpr, OUTPUTS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """The share of ``steps`` times DEPTH rows in the gradients [CHANNELS, OUTPUTS] of TAPS taps."""
    dtype = scale.dtype.element_ty
    groups: tl.constexpr = 9 // TAPS
    part = tl.program_id(0) // groups
    first_tap = tl.program_id(0) % groups * TAPS
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    output = tl.program_id(2) * OUTPUTS + tl.arange(0, OUTPUTS)
    within, wanted = channel < channels, output < outputs
    factor = tl.load(scale + channel, mask=within, other=0.0)[:, None]
    summand = tl.load(shift + channel, mask=within, other=0.0)[:, None]
    sums = ()
    for _ in tl.static_range(TAPS):
        sums = sums + (tl.zeros((CHANNELS, OUTPUTS), dtype),)
    for step in range(0, steps):
        first = (part.to(tl.int64) * steps + step) * DEPTH
        row = first + tl.arange(0, DEPTH)
        line, column = _pixels(first, height, width, DEPTH)
        neighbours = tl.where(row < rows, _neighbours(line, column, height, width), 0)
        inputs = tl.load(
            x + (row * x_stride)[None, :] + channel[:, None], mask=(row < rows)[None, :] & within[:, None], other=0.0
        )
        activation = activate(inputs, factor, summand, x.dtype.element_ty)
        updated = ()
        for index in tl.static_range(TAPS):
            tap = first_tap + index
            neighbour = (1 - tap // 3) * width + 1 - tap % 3
            exists = ((neighbours >> (8 - tap)) & 1) != 0
            place = ((row + neighbour) * out_grad_stride)[:, None] + output[None, :]
            gradient = tl.load(out_grad + place, mask=exists[:, None] & wanted[None, :], other=0.0)
            updated = updated + (
                tl.dot(activation, gradient, sums[index], input_precision=PRECISION, out_dtype=dtype),
            )
        sums = updated
    for index in tl.static_range(TAPS):
        tap = (part.to(tl.int64) * 9 + first_tap + index) * channels
        place = partials + (tap + channel)[:, None] * outputs + output[None, :]
        tl.store(place, sums[index], mask=within[:, None] & wanted[None, :])


@triton.jit(do_not_specialize=["parts"])
def _finish_weight_kernel(
    partials, grad_weight, parts, channels, outputs, PARTS: tl.constexpr, ELEMENTS: tl.constexpr
):  # fmt: skip
    """Adds the partial gradients [parts, 9, channels, outputs] in a fixed order into [outputs, channels, 9]."""
    size = 9 * channels * outputs
    element = tl.program_id(0) * ELEMENTS + tl.arange(0, ELEMENTS)
    total = tl.zeros((PARTS, ELEMENTS), partials.dtype.element_ty)
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)
        exists = (part < parts)[:, None] & (element < size)[None, :]
        total += tl.load(partials + part.to(tl.int64)[:, None] * size + element[None, :], mask=exists, other=0.0)
    tap, channel, output = element // (channels * outputs), element // outputs % channels, element % outputs
    place = (output.to(tl.int64) * channels + channel) * 9 + tap
    tl.store(grad_weight + place, tl.sum(total, 0), mask=element < size)


def _input_tile(dtype: torch.dtype, precision: str, channels: int) -> Tile:
    columns = 64 if channels % 128 > 64 or channels % 128 == 0 else 64
    if dtype.itemsize == 2:
        return Tile(128, columns, 64, warps=8, stages=3)
    if precision == "tf32":
        return Tile(128, columns, 32, warps=8, stages=3)
    return Tile(64, min(columns, 64), 16, warps=4, stages=2)


def _weight_tile(dtype: torch.dtype, precision: str, channels: int, outputs: int) -> tuple[Tile, int]:
    columns = min(max(triton.next_power_of_2(outputs), 16), 64)
    return Tile(64, columns, 32, warps=4, stages=2), 3


def bn_relu_conv3x3_backward(
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
    grad_weight: Tensor | None,  # [K, C, 3, 3]
    sum_grad: Tensor | None,  # [C]
    sum_grad_x: Tensor | None,  # [C]
) -> None:
    """Backward of `bn_relu_conv3x3`: of the gradients of its input and weight, those asked for."""
    if sum_grad is not None:
        _input_gradient(
            out_grad, x, mean, scale, shift, weight, height, width, grad, accumulate, sum_grad, sum_grad_x
        )
    if grad_weight is not None:
        _weight_gradient(out_grad, x, scale, shift, height, width, grad_weight)


def _input_gradient(
    out_grad: Tensor,
    x: Tensor,
    mean: Tensor,
    scale: Tensor,
    shift: Tensor,
    weight: Tensor,
    height: int,
    width: int,
    grad: Tensor | None,
    accumulate: bool,
    sum_grad: Tensor,
    sum_grad_x: Tensor | None,
) -> None:
    (rows, channels), outputs = x.shape, out_grad.shape[1]
    precision = dot_precision(x.dtype)
    tile = _input_tile(x.dtype, precision, channels)
    grid = triton.cdiv(rows, tile.rows), triton.cdiv(channels, tile.columns)
    partials = mean.new_empty(2, grid[0], channels)
    # On the tensor cores, float32 operands must lie with the depth of the product contiguous.
    order = (1, 2, 3, 0) if x.dtype == torch.float32 else (2, 3, 0, 1)
    permuted = weight.permute(order)
    taps = weight.new_empty(permuted.shape, dtype=x.dtype).copy_(permuted)
    strides = (1, 9 * outputs) if x.dtype == torch.float32 else (channels, 1)
    with on_device(x):
        _input_gradient_kernel[grid](
            out_grad, out_grad.stride(0), x, x.stride(0), mean, scale, shift, taps, *strides,
            grad, 0 if grad is None else grad.stride(0), partials,
            rows, height, width, channels, outputs, accumulate, precision, tile.rows, tile.columns, tile.depth,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    finish_sums(partials, sum_grad, sum_grad_x)


def _weight_gradient(
    out_grad: Tensor, x: Tensor, scale: Tensor, shift: Tensor, height: int, width: int, grad_weight: Tensor
) -> None:
    (rows, channels), outputs = x.shape, out_grad.shape[1]
    precision = dot_precision(x.dtype)
    tile, taps = _weight_tile(x.dtype, precision, channels, outputs)
    blocks = triton.cdiv(channels, tile.rows), triton.cdiv(outputs, tile.columns)
    most = max(PROGRAMS // (9 // taps * blocks[0] * blocks[1]), 1)
    steps = triton.cdiv(rows, tile.depth * most)
    parts = triton.cdiv(rows, tile.depth * max(steps, 1))
    partials = scale.new_empty(parts, 9, channels, outputs)
    with on_device(x):
        _weight_gradient_kernel[9 // taps * parts, *blocks](
            out_grad, out_grad.stride(0), x, x.stride(0), scale, shift, partials,
            rows, steps, height, width, channels, outputs,
            precision, taps, tile.rows, tile.columns, tile.depth, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        elements = grad_weight.numel()
        _finish_weight_kernel[(triton.cdiv(elements, ELEMENTS),)](
            partials, grad_weight, parts, channels, outputs, PARTS, ELEMENTS
        )
