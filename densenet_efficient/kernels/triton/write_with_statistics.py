"""Images written as rows of a slot, with the mean and variance of each channel."""

import triton.language as tl
from torch import Tensor

from .blocks import block_and_part
from .launch import ceil_div, check_pixels, grid_of, kernel, on_device, pixel_tile
from .statistics import finish_statistics, store_statistics, tile_statistics

ELEMENTS = 8192
WARPS = 8


@kernel(do_not_specialize=["rows"])
def write_with_statistics_kernel(
    x, image_stride, channel_stride, pixel_stride, pixels, out, out_stride, partials, rows, channels,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """A tile of rows: side by side lie the pixels of a channel in contiguous images, the channels in channels-last."""
    dtype = partials.dtype.element_ty
    block, part = block_and_part(channels, CHANNELS)
    row = part * ROWS + tl.arange(0, ROWS)
    channel = block * CHANNELS + tl.arange(0, CHANNELS)
    valid = (row < rows)[:, None]
    inside = valid & (channel < channels)[None, :]
    pixel = (row // pixels).to(tl.int64) * image_stride + (row % pixels).to(tl.int64) * pixel_stride
    place = x + pixel[:, None] + (channel.to(tl.int64) * channel_stride)[None, :]
    values = tl.load(place, mask=inside, other=0.0)
    tl.store(out + row.to(tl.int64)[:, None] * out_stride + channel[None, :], values, mask=inside)
    count = tl.minimum(rows - part * ROWS, ROWS).to(dtype)
    mean, m2 = tile_statistics(values.to(dtype), valid, count)
    store_statistics(partials, part, tl.cdiv(rows, ROWS), channels, channel, count, mean, m2)


def write_with_statistics(
    x: Tensor,  # [N, C, P]
    out: Tensor,  # [N*P, C]
    mean: Tensor,  # [C]
    variance: Tensor,  # [C]
) -> None:
    """out = the pixels of ``x``, and the mean and biased variance of each column."""
    rows, channels = out.shape
    check_pixels(rows)
    tile_rows, columns = pixel_tile(channels, ELEMENTS)
    parts = ceil_div(rows, tile_rows)
    grid = grid_of(parts, channels, columns)
    partials = mean.new_empty(3, parts, channels)
    with on_device(x):
        write_with_statistics_kernel[grid](
            x, *x.stride(), x.shape[2], out, out.stride(0), partials, rows, channels, tile_rows, columns,
            num_warps=WARPS,
        )  # fmt: skip
    finish_statistics(partials, mean, variance)
