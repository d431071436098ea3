"""Backward of the maximum pooling: the winner of each window first (a byte each), then every pixel asks its windows."""

import torch
import triton.language as tl
from torch import Tensor

from .activation import activate, deposit, mask_gradient
from .blocks import block_and_part
from .bn_relu_max_pool import ELEMENTS, maximum_of_window
from .launch import ceil_div, check_pixels, grid_of, kernel, on_device, pixel_tile
from .statistics import finish_sums, store_sums


@kernel(do_not_specialize=["pooled"])
def bn_relu_max_pool_backward_winner_kernel(
    x, x_stride, scale, shift, winners, pooled, channels, height, width, ROWS: tl.constexpr, CHANNELS: tl.constexpr
):
    block, part = block_and_part(channels, CHANNELS)
    row = part * ROWS + tl.arange(0, ROWS)
    channel = block * CHANNELS + tl.arange(0, CHANNELS)
    present = channel < channels
    factor = tl.load(scale + channel, mask=present, other=0.0)[None, :]
    summand = tl.load(shift + channel, mask=present, other=0.0)[None, :]
    _, winner = maximum_of_window(
        x, x_stride, factor, summand, row, pooled, channel, present, height, width, ROWS, CHANNELS
    )
    inside = (row < pooled)[:, None] & present[None, :]
    tl.store(winners + row.to(tl.int64)[:, None] * channels + channel[None, :], winner.to(tl.uint8), mask=inside)


@kernel(do_not_specialize=["rows"])
def bn_relu_max_pool_backward_gather_kernel(
    out_grad, out_grad_stride, winners, x, x_stride, mean, scale, shift, grad, grad_stride, partials, rows, channels,
    height, width, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """A tile of pixels; each lies in one or two windows per direction."""
    dtype = scale.dtype.element_ty
    block, part = block_and_part(channels, CHANNELS)
    row = part * ROWS + tl.arange(0, ROWS)
    channel = block * CHANNELS + tl.arange(0, CHANNELS)
    present = channel < channels
    inside = (row < rows)[:, None] & present[None, :]
    pooled_height, pooled_width = (height + 1) // 2, (width + 1) // 2
    image, line, column = row // width // height, row // width % height, row % width
    gradient = tl.zeros((ROWS, CHANNELS), dtype)
    for candidate in range(4):
        window_line, window_column = line // 2 + candidate // 2, column // 2 + candidate % 2
        tap_line, tap_column = line - 2 * window_line + 1, column - 2 * window_column + 1
        exists = (tap_line >= 0) & (window_line < pooled_height) & (tap_column >= 0) & (window_column < pooled_width)
        window = ((image * pooled_height + window_line) * pooled_width + window_column).to(tl.int64)[:, None]
        reached = inside & exists[:, None]
        winner = tl.load(winners + window * channels + channel[None, :], mask=reached, other=255).to(tl.int32)
        won = reached & (winner == (tap_line * 3 + tap_column)[:, None])
        arriving = tl.load(out_grad + window * out_grad_stride + channel[None, :], mask=won, other=0.0)
        gradient += arriving.to(dtype)
    factor = tl.load(scale + channel, mask=present, other=0.0)[None, :]
    summand = tl.load(shift + channel, mask=present, other=0.0)[None, :]
    centre = tl.load(mean + channel, mask=present, other=0.0)[None, :]
    values = tl.load(x + row.to(tl.int64)[:, None] * x_stride + channel[None, :], mask=inside, other=0.0)
    gradient = mask_gradient(gradient, activate(values, factor, summand, values.dtype))
    sum_grad_x = tl.sum(gradient * (values.to(dtype) - centre), 0)
    store_sums(partials, part, tl.cdiv(rows, ROWS), channels, channel, tl.sum(gradient, 0), sum_grad_x)
    deposit(grad, row.to(tl.int64)[:, None] * grad_stride + channel[None, :], gradient, factor, inside, False)


def bn_relu_max_pool_backward(
    out_grad: Tensor,  # [N*H'*W', C]
    x: Tensor,  # [M, C]
    mean: Tensor,  # [C]
    scale: Tensor,  # [C]
    shift: Tensor,  # [C]
    height: int,
    width: int,
    grad: Tensor,  # [M, C]
    sum_grad: Tensor,  # [C]
    sum_grad_x: Tensor,  # [C]
) -> None:
    """The sums, and ``grad = scale * masked gradient``; a window's gradient goes to its first maximum."""
    (rows, channels), pooled = x.shape, out_grad.shape[0]
    check_pixels(rows)
    tile_rows, columns = pixel_tile(channels, ELEMENTS)
    winners = torch.empty(pooled, channels, dtype=torch.uint8, device=x.device)
    parts = ceil_div(rows, tile_rows)
    partials = sum_grad.new_empty(2, parts, channels)
    with on_device(x):
        bn_relu_max_pool_backward_winner_kernel[grid_of(ceil_div(pooled, tile_rows), channels, columns)](
            x, x.stride(0), scale, shift, winners, pooled, channels, height, width, tile_rows, columns
        )
        bn_relu_max_pool_backward_gather_kernel[grid_of(parts, channels, columns)](
            out_grad, out_grad.stride(0), winners, x, x.stride(0), mean, scale, shift, grad, grad.stride(0),
            partials, rows, channels, height, width, tile_rows, columns,
        )  # fmt: skip
    finish_sums(partials, sum_grad, sum_grad_x)
