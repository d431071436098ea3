"""The batch norm's projection of a gradient, in place."""

import triton.language as tl
from torch import Tensor

from .activation import project
from .blocks import block_and_part
from .launch import ceil_div, grid_of, kernel, on_device, pixel_tile

ELEMENTS = 4096


@kernel(do_not_specialize=["rows"])
def project_gradient_kernel(
    grad, grad_stride, x, x_stride, mean, slope, offset, rows, channels, ROWS: tl.constexpr, CHANNELS: tl.constexpr
):
    block, part = block_and_part(channels, CHANNELS)
    row = part.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = block * CHANNELS + tl.arange(0, CHANNELS)
    present = channel < channels
    inside = (row < rows)[:, None] & present[None, :]
    place = grad + row[:, None] * grad_stride + channel[None, :]
    gradient = tl.load(place, mask=inside, other=0.0)
    value = tl.load(x + row[:, None] * x_stride + channel[None, :], mask=inside, other=0.0)
    centre = tl.load(mean + channel, mask=present, other=0.0)[None, :]
    factor = tl.load(slope + channel, mask=present, other=0.0)[None, :]
    summand = tl.load(offset + channel, mask=present, other=0.0)[None, :]
    tl.store(place, project(gradient, value, centre, factor, summand).to(gradient.dtype), mask=inside)


def project_gradient(
    grad: Tensor,  # [M, C]
    x: Tensor,  # [M, C]
    mean: Tensor,  # [C]
    slope: Tensor,  # [C]
    offset: Tensor,  # [C]
) -> None:
    """grad += offset + (x - mean) * slope."""
    rows, channels = x.shape
    tile_rows, columns = pixel_tile(channels, ELEMENTS)
    with on_device(x):
        project_gradient_kernel[grid_of(ceil_div(rows, tile_rows), channels, columns)](
            grad, grad.stride(0), x, x.stride(0), mean, slope, offset, rows, channels, tile_rows, columns
        )
