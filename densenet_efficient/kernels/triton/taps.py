"""Device functions of 3x3 windows. Taps are numbered 0 to 8, line by line; tap 4 is the pixel itself."""

import triton
import triton.language as tl


@triton.jit
def existing_neighbours(first, height, width, PIXELS: tl.constexpr):
    """For the pixels of the rows ``first``, ``first`` + 1, ...: bit t is set where the neighbour at tap t exists."""
    in_image = (first % (height * width)).to(tl.int32) + tl.arange(0, PIXELS)
    line, column = in_image // width % height, in_image % width
    lines = 0b000111000 | tl.where(line > 0, 0b000000111, 0) | tl.where(line < height - 1, 0b111000000, 0)
    columns = 0b010010010 | tl.where(column > 0, 0b001001001, 0) | tl.where(column < width - 1, 0b100100100, 0)
    return lines & columns


@triton.jit
def exists_at(neighbours, tap):
    """Whether the neighbour at ``tap`` exists."""
    return ((neighbours >> tap) & 1) != 0


@triton.jit
def row_offset(tap, width):
    """From a pixel's row to that of its neighbour at ``tap``."""
    return (tap // 3 - 1) * width + tap % 3 - 1
