"""Average pooling of relu(x * scale + shift) over windows side by side."""

import triton.language as tl
from torch import Tensor

from .activation import activate
from .blocks import block_and_part
from .launch import ceil_div, check_pixels, grid_of, kernel, on_device, pixel_tile

ELEMENTS = 1024


@kernel(do_not_specialize=["pooled"])
def bn_relu_avg_pool_kernel(
    x, x_stride, scale, shift, out, out_stride, pooled, channels,
    height, width, window_height, window_width, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """A tile of pooled pixels, its windows one tap at a time."""
    dtype = scale.dtype.element_ty
    block, part = block_and_part(channels, CHANNELS)
    row = part * ROWS + tl.arange(0, ROWS)
    channel = block * CHANNELS + tl.arange(0, CHANNELS)
    present = channel < channels
    inside = (row < pooled)[:, None] & present[None, :]
    factor = tl.load(scale + channel, mask=present, other=0.0)[None, :]
    summand = tl.load(shift + channel, mask=present, other=0.0)[None, :]
    pooled_height, pooled_width = height // window_height, width // window_width
    line, column = row // pooled_width, row % pooled_width
    image, line = line // pooled_height, line % pooled_height
    first = (image * height + line * window_height) * width + column * window_width
    total = tl.zeros((ROWS, CHANNELS), dtype)
    for tap in range(window_height * window_width):
        pixel = first + tap // window_width * width + tap % window_width
        values = tl.load(x + pixel.to(tl.int64)[:, None] * x_stride + channel[None, :], mask=inside, other=0.0)
        total += activate(values, factor, summand, values.dtype).to(dtype)
    mean = total / tl.cast(window_height * window_width, dtype)
    place = out + row.to(tl.int64)[:, None] * out_stride + channel[None, :]
    tl.store(place, mean.to(out.dtype.element_ty), mask=inside)


def bn_relu_avg_pool(
    x: Tensor,  # [M, C]
    scale: Tensor,  # [C]
    shift: Tensor,  # [C]
    height: int,
    width: int,
    window_height: int,
    window_width: int,
    out: Tensor,  # [N*(H//wh)*(W//ww), C]
) -> None:
    """Means of relu(x * scale + shift) over windows; a rest is left out."""
    pooled, channels = out.shape
    check_pixels(x.shape[0])
    tile_rows, columns = pixel_tile(channels, ELEMENTS)
    with on_device(x):
        bn_relu_avg_pool_kernel[grid_of(ceil_div(pooled, tile_rows), channels, columns)](
            x, x.stride(0), scale, shift, out, out.stride(0), pooled, channels,
            height, width, window_height, window_width, tile_rows, columns,
        )  # fmt: skip
