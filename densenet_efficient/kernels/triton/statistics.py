"""Reductions over rows in stages: partial results per program, merged in a fixed order by further kernels.

Statistics travel as (count, mean, M2), M2 being the sum of squared deviations from the mean (Chan et al. 1979), so that
nothing cancels where the mean is far from zero. Which rows a partial result covers depends on the shapes and the card,
never on timing.
"""

import triton
import triton.language as tl
from torch import Tensor

from .blocks import block_and_part
from .launch import ceil_div, grid_of, kernel, on_device

BLOCK_PARTS = 512
BLOCK_CHANNELS = 8
WARPS = 8
SUMMED_PARTS, SUMMED_COLUMNS = 32, 128  # of a program that adds partial gradients of a weight


@triton.jit
def tile_statistics(values, valid, count):
    """Mean and M2 of each column of ``values`` over its ``count`` rows where ``valid`` [rows, 1]."""
    mean = tl.sum(tl.where(valid, values, 0.0), 0) / count
    deviation = tl.where(valid, values - mean[None, :], 0.0)
    return mean, tl.sum(deviation * deviation, 0)


@triton.jit
def store_statistics(partials, part, parts, channels, column, count, mean, m2):
    """Stores one program's result for its columns into ``partials`` [3, parts, channels]."""
    plane = parts.to(tl.int64) * channels
    place = partials + part.to(tl.int64) * channels + column
    within = column < channels
    tl.store(place, tl.zeros_like(mean) + count, mask=within)
    tl.store(place + plane, mean, mask=within)
    tl.store(place + 2 * plane, m2, mask=within)


@triton.jit
def store_sums(partials, part, parts, channels, column, first, second):
    """Stores one program's two sums for its columns into ``partials`` [2, parts, channels]."""
    place = partials + part.to(tl.int64) * channels + column
    within = column < channels
    tl.store(place, first, mask=within)
    tl.store(place + parts.to(tl.int64) * channels, second, mask=within)


@triton.jit
def _block_of_parts(parts, channels, PARTS: tl.constexpr, CHANNELS: tl.constexpr):
    """Where a program's parts lie in a plane [parts, channels] and which exist; its columns, and its result's place."""
    block, row = block_and_part(channels, CHANNELS)
    column = block.to(tl.int64) * CHANNELS + tl.arange(0, CHANNELS)
    part = row.to(tl.int64) * PARTS + tl.arange(0, PARTS)
    place, exists = part[:, None] * channels + column[None, :], (part < parts)[:, None] & (column < channels)[None, :]
    return place, exists, column, row.to(tl.int64) * channels + column


@kernel(do_not_specialize=["parts"])
def merge_statistics_kernel(
    partials, count, mean, m2_or_variance, parts, channels, PARTS: tl.constexpr, CHANNELS: tl.constexpr
):
    """PARTS parts become one row of the results; without a ``count`` it is the last, and the variance is wanted."""
    place, exists, column, row = _block_of_parts(parts, channels, PARTS, CHANNELS)
    plane = tl.cast(parts, tl.int64) * channels
    counts = tl.load(partials + place, mask=exists, other=0.0)
    means = tl.load(partials + plane + place, mask=exists, other=0.0)
    m2s = tl.load(partials + 2 * plane + place, mask=exists, other=0.0)

    total = tl.maximum(tl.sum(counts, 0), 1.0)  # of no rows at all mean and variance are zero
    near = tl.sum(tl.where(tl.arange(0, PARTS)[:, None] == 0, means, 0.0), 0)  # a mean, so differences are small
    merged = near + tl.sum(tl.where(exists, counts * (means - near[None, :]), 0.0), 0) / total
    delta = means - merged[None, :]
    m2 = tl.sum(tl.where(exists, m2s + counts * delta * delta, 0.0), 0)

    within = column < channels
    tl.store(mean + row, merged, mask=within)
    if count is None:
        tl.store(m2_or_variance + row, m2 / total, mask=within)
    else:
        tl.store(count + row, total, mask=within)
        tl.store(m2_or_variance + row, m2, mask=within)


@kernel(do_not_specialize=["parts"])
def merge_sums_kernel(partials, first, second, parts, channels, PARTS: tl.constexpr, CHANNELS: tl.constexpr):
    """PARTS parts become one row of ``first``, and those of the second plane one of ``second``."""
    place, exists, column, row = _block_of_parts(parts, channels, PARTS, CHANNELS)
    within = column < channels
    plane = tl.cast(parts, tl.int64) * channels
    tl.store(first + row, tl.sum(tl.load(partials + place, mask=exists, other=0.0), 0), mask=within)
    tl.store(second + row, tl.sum(tl.load(partials + plane + place, mask=exists, other=0.0), 0), mask=within)


@kernel(do_not_specialize=["parts"])
def sum_parts_kernel(
    partials, out, plane_stride, row_stride, column_stride, first, second, parts, planes, rows, columns,
    PARTS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The sum of all parts of COLUMNS elements; a part is ``planes`` of ``rows`` x ``columns``, then rows of sums."""
    element = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row, column = element // columns, element % columns
    size = (planes * rows + (0 if first is None else 2)) * columns
    total = tl.zeros((PARTS, COLUMNS), partials.dtype.element_ty)
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)
        place = partials + part.to(tl.int64)[:, None] * size + element[None, :]
        total += tl.load(place, mask=(part < parts)[:, None] & (element < size)[None, :], other=0.0)
    result = tl.sum(total, 0)
    place = out + row // rows * plane_stride + row % rows * row_stride + column * column_stride
    tl.store(place, result, mask=row < planes * rows)
    if first is not None:
        tl.store(first + column, result, mask=row == planes * rows)
    if second is not None:
        tl.store(second + column, result, mask=row == planes * rows + 1)


def _merged_parts(parts: int) -> int:
    """How many rows of results are left of so many parts."""
    return max(ceil_div(parts, BLOCK_PARTS), 1)


def finish_statistics(
    partials: Tensor,  # [3, parts, C]: count, mean, M2
    mean: Tensor,  # [C]
    variance: Tensor,  # [C]
) -> None:
    """Merges partial statistics into the mean and the biased variance."""
    _, parts, channels = partials.shape
    rows = _merged_parts(parts)
    grid = grid_of(rows, channels, BLOCK_CHANNELS)
    merged = (None, mean, variance) if rows == 1 else partials.new_empty(3, rows, channels)
    with on_device(partials):
        merge_statistics_kernel[grid](partials, *merged, parts, channels, BLOCK_PARTS, BLOCK_CHANNELS, num_warps=WARPS)
    if isinstance(merged, Tensor):
        finish_statistics(merged, mean, variance)


def finish_sums(
    partials: Tensor,  # [2, parts, C]
    first: Tensor,  # [C]
    second: Tensor,  # [C]
) -> None:
    """Adds partial sums in a fixed order."""
    _, parts, channels = partials.shape
    rows = _merged_parts(parts)
    grid = grid_of(rows, channels, BLOCK_CHANNELS)
    merged = (first, second) if rows == 1 else partials.new_empty(2, rows, channels)
    with on_device(partials):
        merge_sums_kernel[grid](partials, *merged, parts, channels, BLOCK_PARTS, BLOCK_CHANNELS, num_warps=WARPS)
    if isinstance(merged, Tensor):
        finish_sums(merged, first, second)


def sum_parts(
    partials: Tensor,  # [parts, A * B * C], or [parts, A * B * C + 2 * C] with sums
    out: Tensor,  # [A, B, C] of any strides
    first: Tensor | None = None,  # [C]
    second: Tensor | None = None,  # [C]
) -> None:
    """Adds partial gradients of a weight, and the sums that lie behind each of them, in a fixed order."""
    parts, size = partials.shape
    with on_device(partials):
        sum_parts_kernel[(ceil_div(size, SUMMED_COLUMNS),)](
            partials, out, *out.stride(), first, second, parts, *out.shape, SUMMED_PARTS, SUMMED_COLUMNS
        )
