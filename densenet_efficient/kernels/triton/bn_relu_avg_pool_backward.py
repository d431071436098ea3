"""Backward of the average pooling."""

import triton.language as tl
from torch import Tensor

from .activation import activate, deposit, mask_gradient
from .blocks import block_and_part
from .launch import ceil_div, check_pixels, grid_of, kernel, on_device, pixel_tile
from .statistics import finish_sums, store_sums

ELEMENTS = 4096
WARPS = 8


@kernel(do_not_specialize=["rows"])
def bn_relu_avg_pool_backward_kernel(
    out_grad, out_grad_stride, x, x_stride, mean, scale, shift, grad, grad_stride, partials, rows, channels,
    height, width, window_height, window_width,
    ACCUMULATE: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """A tile of pixels; those outside every window get zero."""
    dtype = scale.dtype.element_ty
    block, part = block_and_part(channels, CHANNELS)
    row = part * ROWS + tl.arange(0, ROWS)
    channel = block * CHANNELS + tl.arange(0, CHANNELS)
    present = channel < channels
    inside = (row < rows)[:, None] & present[None, :]
    factor = tl.load(scale + channel, mask=present, other=0.0)[None, :]
    summand = tl.load(shift + channel, mask=present, other=0.0)[None, :]
    centre = tl.load(mean + channel, mask=present, other=0.0)[None, :]
    pooled_height, pooled_width = height // window_height, width // window_width
    image, line, column = row // width // height, row // width % height // window_height, row % width // window_width
    window = ((image * pooled_height + line) * pooled_width + column).to(tl.int64)[:, None]
    covered = inside & ((line < pooled_height) & (column < pooled_width))[:, None]
    spread = tl.load(out_grad + window * out_grad_stride + channel[None, :], mask=covered, other=0.0)
    values = tl.load(x + row.to(tl.int64)[:, None] * x_stride + channel[None, :], mask=inside, other=0.0)
    gradient = spread.to(dtype) / tl.cast(window_height * window_width, dtype)
    gradient = mask_gradient(gradient, activate(values, factor, summand, values.dtype))
    sum_grad_x = tl.sum(gradient * (values.to(dtype) - centre), 0)
    store_sums(partials, part, tl.cdiv(rows, ROWS), channels, channel, tl.sum(gradient, 0), sum_grad_x)
    if grad is not None:
        deposit(grad, row.to(tl.int64)[:, None] * grad_stride + channel[None, :], gradient, factor, inside, ACCUMULATE)


def bn_relu_avg_pool_backward(
    out_grad: Tensor,  # [N*(H//wh)*(W//ww), C]
    x: Tensor,  # [M, C]
    mean: Tensor,  # [C]
    scale: Tensor,  # [C]
    shift: Tensor,  # [C]
    height: int,
    width: int,
    window_height: int,
    window_width: int,
    grad: Tensor | None,  # [M, C]
    accumulate: bool,
    sum_grad: Tensor,  # [C]
    sum_grad_x: Tensor,  # [C]
) -> None:
    """The sums, and ``grad = scale * masked gradient``, or added to what is there."""
    rows, channels = x.shape
    check_pixels(rows)
    tile_rows, columns = pixel_tile(channels, ELEMENTS)
    parts = ceil_div(rows, tile_rows)
    partials = sum_grad.new_empty(2, parts, channels)
    with on_device(x):
        bn_relu_avg_pool_backward_kernel[grid_of(parts, channels, columns)](
            out_grad, out_grad.stride(0), x, x.stride(0), mean, scale, shift,
            grad, 0 if grad is None else grad.stride(0), partials, rows, channels,
            height, width, window_height, window_width, accumulate, tile_rows, columns, num_warps=WARPS,
        )  # fmt: skip
    finish_sums(partials, sum_grad, sum_grad_x)
