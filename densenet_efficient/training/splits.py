"""Splitting labelled samples so that every class, and every group, falls where it should."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def stratified_split(
    labels: NDArray[np.float64],  # [N, K], of zeros and ones
    fractions: Sequence[float],
    seed: int,
    groups: Sequence[str] | None = None,
) -> list[list[int]]:
    """Indices of N samples, divided into parts of about these fractions in which each class is equally frequent.

    Samples of one group (one patient) stay together. This is iterative stratification (Sechidis et al. 2011, "On the
    stratification of multi-label data", ECML PKDD), with groups in the place of single samples: what holds the rarest
    class goes first, each to the part that lacks most of that class, and what holds none goes last. Without groups a
    class of a single-label data set differs from its share by less than one sample. Every part gets each class of which
    at least as many groups as there are parts hold nothing else.
    """
    units = _units(len(labels), groups)
    counts = np.stack([labels[unit].sum(0) for unit in units])  # [units, K]
    labelled = counts.sum(1) > 0
    rarity, rarest = _rarest_classes(counts > 0)
    order = np.random.default_rng(seed).permutation(len(units))
    places = np.where(labelled, rarity[rarest], np.inf)  # what holds no class fills the parts at the end
    order = order[np.argsort(places[order], kind="stable")]
    waiting = np.bincount(rarest[labelled], minlength=counts.shape[1])  # units to come, by their rarest class
    lacking = np.outer(fractions, counts.sum(0))  # [parts, K]
    without = lacking > 0  # the parts that are to get a class, and have none of it yet
    lacking[without] = lacking[without].clip(min=1)  # of a rare class too, one for every part if possible
    lacking_samples = np.array(fractions) * len(labels)
    parts: list[list[int]] = [[] for _ in fractions]
    for unit in order:
        name = rarest[unit]
        need = lacking[:, name] if labelled[unit] else lacking_samples
        # Needs are of samples, which come by the unit: the last units are for the parts that would get none of them.
        last = labelled[unit] and waiting[name] <= without[:, name].sum()
        candidates: Sequence[int] = np.flatnonzero(without[:, name]).tolist() if last else range(len(parts))
        best = max(candidates, key=lambda part: (round(float(need[part]), 9), lacking_samples[part]))
        parts[best] += units[unit]
        waiting[name] -= labelled[unit]
        without[best] &= counts[unit] == 0
        lacking[best] -= counts[unit]
        lacking_samples[best] -= len(units[unit])
    return [sorted(part) for part in parts]


def _rarest_classes(holds: NDArray[np.bool_]) -> tuple[NDArray[np.float64], NDArray[np.intp]]:
    """How many units hold each class, and the rarest class that each unit [units, K] holds."""
    rarity = holds.sum(0).astype(float)
    return rarity, np.where(holds, rarity, np.inf).argmin(1)


def _units(count: int, groups: Sequence[str] | None) -> list[list[int]]:
    """The indices that must stay together."""
    if groups is None:
        return [[index] for index in range(count)]
    members: dict[str, list[int]] = defaultdict(list)
    for index, group in enumerate(groups):
        members[group].append(index)
    return list(members.values())
