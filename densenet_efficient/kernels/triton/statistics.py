"""Reductions over rows in two stages: partial results per program, merged in a fixed order by a second kernel.

Statistics travel as (count, mean, M2), M2 being the sum of squared deviations from the mean (Chan et al. 1979), so that
nothing cancels where the mean is far from zero. Which rows a partial result covers depends on the shapes and on the
number of multiprocessors, never on timing.
"""

import triton
import triton.language as tl
from torch import Tensor

from .launch import on_device

BLOCK_PARTS = 512
BLOCK_CHANNELS = 8
WARPS = 8


@triton.jit
def tile_statistics(values, valid, count):
    """Mean and M2 of each column of ``values`` over its ``count`` rows where ``valid`` [rows, 1]."""
    mean = tl.sum(tl.where(valid, values, 0.0), 0) / count
    deviation = tl.where(valid, values - mean[None, :], 0.0)
    return mean, tl.sum(deviation * deviation, 0)


@triton.jit
def merge_statistics(count, mean, m2, other_count, other_mean, other_m2):
    """(count, mean, M2) of two disjoint sets of rows, the second not empty."""
    total = count + other_count
    fraction = other_count / total
    delta = other_mean - mean
    return total, mean + delta * fraction, m2 + other_m2 + delta * delta * (count * fraction)


@triton.jit
def store_statistics(partials, part, parts, channels, column, count, mean, m2):
    """Stores one program's result for its columns into ``partials`` [3, parts, channels]."""
    plane = parts * channels
    place = partials + part * channels + column
    within = column < channels
    tl.store(place, tl.zeros_like(mean) + count, mask=within)
    tl.store(place + plane, mean, mask=within)
    tl.store(place + 2 * plane, m2, mask=within)


@triton.jit
def store_sums(partials, part, parts, channels, column, first, second):
    """Stores one program's two sums for its columns into ``partials`` [2, parts, channels]."""
    place = partials + part * channels + column
    within = column < channels
    tl.store(place, first, mask=within)
    tl.store(place + parts * channels, second, mask=within)


@triton.jit
def _load_parts(partials, start, parts, channels, column, PARTS: tl.constexpr):
    part = start + tl.arange(0, PARTS)
    within = (part < parts)[:, None] & (column < channels)[None, :]
    return tl.load(partials + part.to(tl.int64)[:, None] * channels + column[None, :], mask=within, other=0.0)


@triton.jit
def _merge_statistics_kernel(
    partials, mean, variance, rows, parts, channels, PARTS: tl.constexpr, CHANNELS: tl.constexpr
):
    column = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    plane = parts * channels
    dtype = partials.dtype.element_ty
    rows = rows.to(dtype)
    within = column < channels
    near = tl.load(partials + plane + column, mask=within & (parts > 0), other=0.0)  # a mean: differences are small
    total = tl.zeros((PARTS, CHANNELS), dtype)
    for start in range(0, parts, PARTS):
        count = _load_parts(partials, start, parts, channels, column, PARTS)
        delta = _load_parts(partials + plane, start, parts, channels, column, PARTS) - near[None, :]
        total += tl.where(count > 0, count * delta, 0.0)
    merged = near + tl.sum(total, 0) / rows
    total = tl.zeros((PARTS, CHANNELS), dtype)
    for start in range(0, parts, PARTS):
        count = _load_parts(partials, start, parts, channels, column, PARTS)
        delta = _load_parts(partials + plane, start, parts, channels, column, PARTS) - merged[None, :]
        m2 = _load_parts(partials + 2 * plane, start, parts, channels, column, PARTS)
        total += m2 + tl.where(count > 0, count * delta * delta, 0.0)
    tl.store(mean + column, merged, mask=within)
    tl.store(variance + column, tl.sum(total, 0) / rows, mask=within)


@triton.jit
def _merge_sums_kernel(partials, first, second, parts, channels, PARTS: tl.constexpr, CHANNELS: tl.constexpr):
    column = tl.program_id(0).to(tl.int64) * CHANNELS + tl.arange(0, CHANNELS)
    which = tl.program_id(1)
    out = second if which else first
    total = tl.zeros((PARTS, CHANNELS), partials.dtype.element_ty)
    for start in range(0, parts, PARTS):
        total += _load_parts(partials + which.to(tl.int64) * parts * channels, start, parts, channels, column, PARTS)
    tl.store(out + column, tl.sum(total, 0), mask=column < channels)


def finish_statistics(
    partials: Tensor,  # [3, parts, C]: count, mean, M2
    rows: int,
    mean: Tensor,  # [C]
    variance: Tensor,  # [C]
) -> None:
    """Merges the partial statistics of all ``rows`` into mean and biased variance."""
    _, parts, channels = partials.shape
    grid = (triton.cdiv(channels, BLOCK_CHANNELS),)
    with on_device(partials):
        _merge_statistics_kernel[grid](
            partials, mean, variance, rows, parts, channels, BLOCK_PARTS, BLOCK_CHANNELS, num_warps=WARPS
        )


def finish_sums(
    partials: Tensor,  # [2, parts, C], or [1, parts, C] without a second
    first: Tensor,  # [C]
    second: Tensor | None = None,  # [C]
) -> None:
    """Adds the partial sums in a fixed order."""
    kinds, parts, channels = partials.shape
    grid = (triton.cdiv(channels, BLOCK_CHANNELS), kinds)
    with on_device(partials):
        _merge_sums_kernel[grid](
            partials, first, first if second is None else second, parts, channels, BLOCK_PARTS, BLOCK_CHANNELS,
            num_warps=WARPS,
        )  # fmt: skip
