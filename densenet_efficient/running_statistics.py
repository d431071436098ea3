"""The update of the running statistics: once per step, from the statistics that an operator returns."""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor

from .dimensions import BatchNorm


class _Update(NamedTuple):
    """``buffer`` moves to ``value`` by the share ``momentum``, for each pair."""

    buffers: list[Tensor]
    values: list[Tensor]
    momentum: float


Moments = tuple[Tensor, Tensor]  # the mean and the unbiased variance


def is_due(norm: BatchNorm) -> bool:
    """Whether a forward updates the running statistics of ``norm``."""
    return norm.training and norm.track_running_stats


def moments(statistics: Tensor, count: int | Tensor) -> Moments:
    """Those of (mean, biased variance) [..., 2, C] over ``count`` values."""
    mean, variance = statistics.detach().unbind(-2)
    return mean, variance * (count / (count - 1))  # a tensor, if the values are of several processes


def update_running_statistics(norms: list[BatchNorm], batch: list[Moments], count: int | Tensor) -> None:
    """torch.nn.BatchNorm2d's update of the buffers of those that are due, from the moments [C] of their inputs.

    A batch without values, of a process by itself, is counted and changes nothing else. All memory is taken before the
    first buffer changes: where it is full, no norm is updated in part.
    """
    due = [(norm, share) for norm, share in zip(norms, batch, strict=True) if is_due(norm)]
    is_empty = isinstance(count, int) and count == 0
    with torch.no_grad():
        groups = {} if is_empty else _by_momentum(due)
        updates = [update for momentum, group in groups.items() for update in _updates(momentum, group)]
        counters = [norm.num_batches_tracked for norm, _ in due if norm.num_batches_tracked is not None]
        counted = list(torch._foreach_add(counters, 1)) if counters else []
        if counters:
            torch._foreach_copy_(counters, counted)  # an addition in place allocates its number anew for each
        for update in updates:
            torch._foreach_lerp_(*update)


def _by_momentum(due: list[tuple[BatchNorm, Moments]]) -> dict[float, list[tuple[BatchNorm, Moments]]]:
    """The same by the momentum of this batch; None is the cumulative average."""
    groups: dict[float, list[tuple[BatchNorm, Moments]]] = {}
    for norm, share in due:
        momentum = norm.momentum
        if momentum is None:
            momentum = 1 / (float(cast(Tensor, norm.num_batches_tracked)) + 1)
        groups.setdefault(momentum, []).append((norm, share))
    return groups


def _updates(momentum: float, group: list[tuple[BatchNorm, Moments]]) -> list[_Update]:
    """Of the means and of the variances."""
    means = [cast(Tensor, norm.running_mean) for norm, _ in group]
    variances = [cast(Tensor, norm.running_var) for norm, _ in group]
    return [
        _Update(means, _in_dtype_of(means, [mean for _, (mean, _) in group]), momentum),
        _Update(variances, _in_dtype_of(variances, [variance for _, (_, variance) in group]), momentum),
    ]


def _in_dtype_of(buffers: list[Tensor], values: list[Tensor]) -> list[Tensor]:
    pairs = zip(buffers, values, strict=True)
    return [value if value.dtype == buffer.dtype else value.to(buffer.dtype) for buffer, value in pairs]
