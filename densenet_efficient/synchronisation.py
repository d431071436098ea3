"""Batch statistics of several processes: merged once per channel, where one process alone would take them.

A dense block shares a channel's statistics among all its consumers, so a layer exchanges what it adds, its k new
channels and its bottleneck, while `torch.nn.SyncBatchNorm` exchanges the whole input of every norm. The backward
exchanges the two coefficients of the deferred projection, which are sums over the images, once per channel too.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .dimensions import BatchNorm

# Renamed in torch 2.14; None where torch is built without distributed.
all_gather: Any = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)
all_reduce: Any = getattr(dist, "all_reduce", None)


class Synchronisation(NamedTuple):
    """The processes that normalise together."""

    counts: Tensor  # [processes], the values per channel that each has
    group: str  # the name of torch's process group

    def merge(self, mean: Tensor, variance: Tensor) -> None:
        """Turns a process's statistics [C] into those of all, in place (Chan et al. 1979; never E[x^2] - E[x]^2)."""
        mine = torch.stack([mean, variance])
        every = mine.new_empty(2 * len(self.counts), mine.shape[1])
        all_gather(every, mine, group=resolve(self.group))
        shares = (self.counts / self.counts.sum()).to(mine.dtype)[:, None]
        means, variances = every[::2], every[1::2]
        torch.sum(means * shares, 0, out=mean)
        torch.sum((variances + (means - mean).square()) * shares, 0, out=variance)

    def average(self, slope: Tensor, offset: Tensor) -> None:
        """Turns sums over a process's values [C] into means over the values of all, in place."""
        both = torch.stack([slope, offset])
        all_reduce(both, group=resolve(self.group))
        both /= self.counts.sum().to(both.dtype)
        slope.copy_(both[0])
        offset.copy_(both[1])


def resolve(name: str) -> dist.ProcessGroup:
    """The process group of this name."""
    resolve_name: Any = vars(dist.distributed_c10d)["_resolve_process_group"]
    group: dist.ProcessGroup = resolve_name(name)
    return group


def group_of(norm: nn.Module) -> str:
    """The name of the group in which a norm in training takes its statistics; empty for a process by itself."""
    if not isinstance(norm, nn.SyncBatchNorm) or not (dist.is_available() and dist.is_initialized()):
        return ""
    group: Any = norm.process_group or dist.group.WORLD
    return "" if dist.get_world_size(group) == 1 else str(group.group_name)


def group_of_all(norms: list[BatchNorm]) -> str:
    """The group of norms that share statistics. Raises ValueError if they take them in several groups."""
    groups = {group_of(norm) for norm in norms if norm.training}
    if len(groups) > 1:
        raise ValueError(
            "the norms of a dense block share their statistics, but are synchronised in different groups; "
            "convert all of them, by torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)"
        )
    return groups.pop() if groups else ""


def exchange_counts(count: int, group: str, like: Tensor) -> Tensor | None:
    """How many values per channel each process of the group has; None without a group."""
    if not group:
        return None
    mine = torch.full((1,), count, dtype=torch.float64, device=like.device)  # on a GPU without waiting for it
    counts = mine.new_empty(dist.get_world_size(resolve(group)))
    all_gather(counts, mine, group=resolve(group))
    return counts
