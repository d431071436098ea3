"""The update of the running statistics: once per step, from the statistics that an operator returns."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from .dimensions import BatchNorm


def update_running_statistics(norms: list[BatchNorm], batch: list[Tensor], count: int | Tensor) -> None:
    """torch.nn.BatchNorm2d's update of its buffers from (mean, biased variance) [2, C] over ``count`` values.

    All of them or none: what may lack memory comes before the first change.
    """
    groups = _by_momentum(norms, batch)
    if not groups:
        return  # and leaves no empty no_grad behind, which torch.export cannot load
    with torch.no_grad():
        updates: list[tuple[float, list[Tensor], list[Tensor]]] = []
        for momentum, group in groups.items():
            means = [cast(Tensor, norm.running_mean) for norm, _ in group]
            variances = [cast(Tensor, norm.running_var) for norm, _ in group]
            correction = count / (count - 1)  # a tensor, if the values are of several processes
            unbiased = torch._foreach_mul([share[1] for _, share in group], correction)
            updates.append((momentum, means, _in_dtype_of(means, [share[0] for _, share in group])))
            updates.append((momentum, variances, _in_dtype_of(variances, list(unbiased))))
        tracked = [norm.num_batches_tracked for group in groups.values() for norm, _ in group]
        counters = [counter for counter in tracked if counter is not None]
        counted = list(torch._foreach_add(counters, 1)) if counters else []
        if counters:
            torch._foreach_copy_(counters, counted)  # an addition in place allocates its number once for each
        for momentum, buffers, values in updates:
            torch._foreach_lerp_(buffers, values, momentum)


def _by_momentum(norms: list[BatchNorm], batch: list[Tensor]) -> dict[float, list[tuple[BatchNorm, Tensor]]]:
    """The norms that are due an update, by their momentum. None is the cumulative average."""
    groups: dict[float, list[tuple[BatchNorm, Tensor]]] = {}
    for norm, share in zip(norms, batch, strict=True):
        if norm.training and norm.track_running_stats:
            momentum = norm.momentum
            if momentum is None:
                momentum = 1 / (float(cast(Tensor, norm.num_batches_tracked)) + 1)
            groups.setdefault(momentum, []).append((norm, share.detach()))
    return groups


def _in_dtype_of(buffers: list[Tensor], values: list[Tensor]) -> list[Tensor]:
    return [value.to(buffer.dtype) for buffer, value in zip(buffers, values, strict=True)]
