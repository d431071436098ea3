"""Mean and variance of each channel."""

import triton.language as tl
from torch import Tensor

from .blocks import block_and_part
from .launch import ceil_div, grid_of, kernel, on_device, pixel_tile
from .statistics import finish_statistics, store_statistics, tile_statistics

ELEMENTS = 16384
WARPS = 8


@kernel(do_not_specialize=["rows"])
def channel_stats_kernel(x, x_stride, partials, rows, channels, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """The statistics of one tile."""
    dtype = partials.dtype.element_ty
    block, part = block_and_part(channels, CHANNELS)
    row = part.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = block * CHANNELS + tl.arange(0, CHANNELS)
    valid = (row < rows)[:, None]
    inside = valid & (channel < channels)[None, :]
    values = tl.load(x + row[:, None] * x_stride + channel[None, :], mask=inside, other=0.0).to(dtype)
    count = tl.minimum(rows - part.to(tl.int64) * ROWS, ROWS).to(dtype)
    mean, m2 = tile_statistics(values, valid, count)
    store_statistics(partials, part, tl.cdiv(rows, ROWS), channels, channel, count, mean, m2)


def channel_stats(
    x: Tensor,  # [M, C]
    mean: Tensor,  # [C]
    variance: Tensor,  # [C]
) -> None:
    """Mean and biased variance of each column of ``x``."""
    rows, channels = x.shape
    tile_rows, columns = pixel_tile(channels, ELEMENTS)
    parts = ceil_div(rows, tile_rows)
    grid = grid_of(parts, channels, columns)
    partials = mean.new_empty(3, parts, channels)
    with on_device(x):
        channel_stats_kernel[grid](x, x.stride(0), partials, rows, channels, tile_rows, columns, num_warps=WARPS)
    finish_statistics(partials, mean, variance)
