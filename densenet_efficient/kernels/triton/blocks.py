"""Device functions of operations on tiles of rows and channels: which of them a program owns."""

import triton
import triton.language as tl


@triton.jit
def block_and_part(channels, CHANNELS: tl.constexpr):
    """The block of channels and the part of the rows of this program; `launch.grid_of` is their grid.

    Programs lie along the first axis alone, for of the others a grid has at most 65,535. All blocks of a part come
    before the next part, so that a row is read at once.
    """
    blocks = tl.cdiv(channels, CHANNELS)
    return tl.program_id(0) % blocks, tl.program_id(0) // blocks
