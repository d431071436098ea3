"""The update of the running statistics: once per step, from the statistics that an operator returns."""

from __future__ import annotations

import torch
from torch import Tensor

from .dimensions import BatchNorm

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

    A batch without values, of a process by itself, is counted and changes nothing else.
    """
    is_empty = isinstance(count, int) and count == 0
    with torch.no_grad():
        _update([(norm, share) for norm, share in zip(norms, batch, strict=True) if is_due(norm)], is_empty)


def _update(due: list[tuple[BatchNorm, Moments]], is_empty: bool) -> None:
    """All memory is taken before the first buffer changes: where it is full, no norm is updated in part."""
    counters = [norm.num_batches_tracked for norm, _ in due if norm.num_batches_tracked is not None]
    updates = {} if is_empty else _by_momentum(due)
    every = [*counters, *(buffer for buffers, _ in updates.values() for buffer in buffers)]
    if len(due) > 1 and len(set(map(id, every))) < len(every):  # a norm that layers share is updated by each in turn
        for one in due:
            _update([one], is_empty)
        return
    if counters:  # an addition in place would allocate its number anew for each
        torch._foreach_copy_(counters, list(torch._foreach_add(counters, 1)))
    for momentum, (buffers, values) in updates.items():
        torch._foreach_lerp_(buffers, values, momentum)


def _by_momentum(due: list[tuple[BatchNorm, Moments]]) -> dict[float, tuple[list[Tensor], list[Tensor]]]:
    """The buffers, and the values that they move to by the share ``momentum``."""
    groups: dict[float, tuple[list[Tensor], list[Tensor]]] = {}
    for norm, (mean, variance) in due:
        running_mean, running_var = norm.running_mean, norm.running_var
        if running_mean is None or running_var is None:
            continue  # tracking was switched on after the norm was made
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
