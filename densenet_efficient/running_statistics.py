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


def update_running_statistics(norms: list[BatchNorm], batch: list[Tensor], count: int | Tensor) -> None:
    """torch.nn.BatchNorm2d's update of its buffers from (mean, biased variance) [2, C] over ``count`` values.

    All memory is taken before the first buffer changes: where it is full, no norm is updated in part.
    """
    due = [
        (norm, share.detach())
        for norm, share in zip(norms, batch, strict=True)
        if norm.training and norm.track_running_stats
    ]
    if not due:
        return  # and leaves no empty no_grad behind, which torch.export cannot load
    with torch.no_grad():
        groups = _by_momentum(due)
        updates = [update for momentum, group in groups.items() for update in _updates(momentum, group, count)]
        counters = [norm.num_batches_tracked for norm, _ in due if norm.num_batches_tracked is not None]
        counted = list(torch._foreach_add(counters, 1)) if counters else []
        if counters:
            torch._foreach_copy_(counters, counted)  # an addition in place allocates its number anew for each
        for update in updates:
            torch._foreach_lerp_(*update)


def _by_momentum(due: list[tuple[BatchNorm, Tensor]]) -> dict[float, list[tuple[BatchNorm, Tensor]]]:
    """The same by the momentum of this batch; None is the cumulative average."""
    groups: dict[float, list[tuple[BatchNorm, Tensor]]] = {}
    for norm, share in due:
        momentum = norm.momentum
        if momentum is None:
            momentum = 1 / (float(cast(Tensor, norm.num_batches_tracked)) + 1)
        groups.setdefault(momentum, []).append((norm, share))
    return groups


def _updates(momentum: float, group: list[tuple[BatchNorm, Tensor]], count: int | Tensor) -> list[_Update]:
    """Of the means and of the variances, which become unbiased."""
    means = [cast(Tensor, norm.running_mean) for norm, _ in group]
    variances = [cast(Tensor, norm.running_var) for norm, _ in group]
    correction = count / (count - 1)  # a tensor, if the values are of several processes
    unbiased = torch._foreach_mul([share[1] for _, share in group], correction)
    return [
        _Update(means, _in_dtype_of(means, [share[0] for _, share in group]), momentum),
        _Update(variances, _in_dtype_of(variances, list(unbiased)), momentum),
    ]


def _in_dtype_of(buffers: list[Tensor], values: list[Tensor]) -> list[Tensor]:
    return [value.to(buffer.dtype) for buffer, value in zip(buffers, values, strict=True)]
