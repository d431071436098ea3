"""3x3 maximum pooling, stride 2, padding 1, of relu(x * scale + shift)."""

import triton
import triton.language as tl
from torch import Tensor

from .activation import activate
from .blocks import block_and_part
from .launch import ceil_div, check_pixels, grid_of, kernel, on_device, pixel_tile

ELEMENTS = 2048


@triton.jit
def maximum_of_window(
    x, x_stride, factor, summand, row, pooled, channel, present,
    height, width, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """The maximum of each window and the first tap that has it; of NaN, as in torch, the last."""
    dtype = factor.dtype
    pooled_height, pooled_width = (height + 1) // 2, (width + 1) // 2
    top = row // pooled_width % pooled_height * 2 - 1
    left = row % pooled_width * 2 - 1
    first = row // pooled_width // pooled_height * height * width
    best = tl.full((ROWS, CHANNELS), float("-inf"), dtype)
    winner = tl.zeros((ROWS, CHANNELS), tl.int32)
    for tap in range(9):
        line, column = top + tap // 3, left + tap % 3
        exists = (row < pooled) & (line >= 0) & (line < height) & (column >= 0) & (column < width)
        inside = exists[:, None] & present[None, :]
        pixel = first + line * width + column
        values = tl.load(x + pixel.to(tl.int64)[:, None] * x_stride + channel[None, :], mask=inside, other=0.0)
        activation = activate(values, factor, summand, values.dtype).to(dtype)
        wins = inside & ((activation > best) | (activation != activation))
        best = tl.where(wins, activation, best)
        winner = tl.where(wins, tap, winner)
    return best, winner


@kernel(do_not_specialize=["pooled"])
def bn_relu_max_pool_kernel(
    x, x_stride, scale, shift, out, out_stride, pooled, channels, height, width,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    block, part = block_and_part(channels, CHANNELS)
    row = part * ROWS + tl.arange(0, ROWS)
    channel = block * CHANNELS + tl.arange(0, CHANNELS)
    present = channel < channels
    factor = tl.load(scale + channel, mask=present, other=0.0)[None, :]
    summand = tl.load(shift + channel, mask=present, other=0.0)[None, :]
    best, _ = maximum_of_window(
        x, x_stride, factor, summand, row, pooled, channel, present, height, width, ROWS, CHANNELS
    )
    inside = (row < pooled)[:, None] & present[None, :]
    place = out + row.to(tl.int64)[:, None] * out_stride + channel[None, :]
    tl.store(place, best.to(out.dtype.element_ty), mask=inside)


def bn_relu_max_pool(
    x: Tensor,  # [M, C]
    scale: Tensor,  # [C]
    shift: Tensor,  # [C]
    height: int,
    width: int,
    out: Tensor,  # [N*H'*W', C]
) -> None:
    """The maxima of relu(x * scale + shift)."""
    pooled, channels = out.shape
    check_pixels(x.shape[0])
    tile_rows, columns = pixel_tile(channels, ELEMENTS)
    with on_device(x):
        bn_relu_max_pool_kernel[grid_of(ceil_div(pooled, tile_rows), channels, columns)](
            x, x.stride(0), scale, shift, out, out.stride(0), pooled, channels, height, width, tile_rows, columns
        )
