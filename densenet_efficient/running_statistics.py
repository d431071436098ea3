"""The update of the running statistics: once per step, from the statistics that an operator returns."""

from __future__ import annotations

import torch
from torch import Tensor

from .dimensions import BatchNorm
from .module_tensors import tensor_of

Moments = tuple[Tensor, Tensor]  # the mean and the unbiased variance
Update = tuple[BatchNorm, Moments | None]  # of a batch without values a norm counts that it was there, and no more


def is_due(norm: BatchNorm) -> bool:
    """Whether a forward updates the running statistics of ``norm``."""
    return norm.training and norm.track_running_stats


def moments(statistics: Tensor, count: int | Tensor) -> Moments:
    """Those of (mean, biased variance) [..., 2, C] over ``count`` values."""
    mean, variance = statistics.detach().unbind(-2)
    return mean, variance * (count / (count - 1))  # a tensor, if the values are of several processes


def updates_of(norms: list[BatchNorm], batch: list[Moments], count: int | Tensor) -> list[Update]:
    """Those that are due, from the moments [C] of their inputs; of a process by itself these may have no values."""
    is_empty = isinstance(count, int) and count == 0
    return [(norm, None if is_empty else share) for norm, share in zip(norms, batch, strict=True) if is_due(norm)]


def update_running_statistics(updates: list[Update]) -> None:
    """torch.nn.BatchNorm2d's update of their buffers.

    All memory is taken before the first buffer changes: where it is full, no norm is updated in part.
    """
    if updates:  # else an empty no_grad were left behind, which torch.export cannot load
        with torch.no_grad():
            _update(updates)


def _update(updates: list[Update]) -> None:
    every_counter = [tensor_of(norm, "num_batches_tracked") for norm, _ in updates]
    counters = [counter for counter in every_counter if counter is not None]
    groups = _by_momentum(updates)
    every = [*counters, *(buffer for buffers, _ in groups.values() for buffer in buffers)]
    are_shared = len(set(map(id, every))) < len(every)
    if are_shared and len(updates) > 1:  # a norm that layers share is updated by each in turn
        for update in updates:
            _update([update])
        return
    if counters:  # an addition in place would allocate its number anew for each
        torch._foreach_copy_(counters, list(torch._foreach_add(counters, 1)))
    for momentum, (buffers, values) in groups.items():
        torch._foreach_lerp_(buffers, values, momentum)


def _by_momentum(updates: list[Update]) -> dict[float, tuple[list[Tensor], list[Tensor]]]:
    """The buffers, and the values that they move to by the share ``momentum``."""
    groups: dict[float, tuple[list[Tensor], list[Tensor]]] = {}
    for norm, share in updates:
        running_mean, running_var = tensor_of(norm, "running_mean"), tensor_of(norm, "running_var")
        if share is None or running_mean is None or running_var is None:
            continue  # without statistics where tracking was switched on after the norm was made
        mean, variance = share
        buffers, values = groups.setdefault(_momentum_of(norm), ([], []))
        buffers += running_mean, running_var
        values += _in_dtype_of(running_mean, mean), _in_dtype_of(running_var, variance)
    return groups


def _in_dtype_of(buffer: Tensor, value: Tensor) -> Tensor:
    return value if value.dtype == buffer.dtype else value.to(buffer.dtype)


def _momentum_of(norm: BatchNorm) -> float:
    """Of this batch; None is the cumulative average, which without a counter stays where it is."""
    if norm.momentum is not None:
        return norm.momentum
    return 0.0 if norm.num_batches_tracked is None else 1 / (float(norm.num_batches_tracked) + 1)
