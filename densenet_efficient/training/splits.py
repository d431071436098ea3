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
    class goes first, each to the part that lacks most of that class. Without groups a class of a single-label data set
    differs from its share by less than one sample.
    """
    units = _units(len(labels), groups)
    counts = np.stack([labels[unit].sum(0) for unit in units])  # [units, K]
    totals = counts.sum(0)
    rarity = np.where(totals > 0, totals, np.inf)
    rarest = np.where(counts > 0, rarity, np.inf).argmin(1)  # of the classes that a unit holds
    order = np.random.default_rng(seed).permutation(len(units))
    order = order[np.argsort(rarity[rarest[order]], kind="stable")]
    lacking = np.outer(fractions, totals)  # [parts, K]
    lacking[lacking > 0] = lacking[lacking > 0].clip(min=1)  # of a rare class too, one for every part if possible
    lacking_samples = np.array(fractions) * len(labels)
    parts: list[list[int]] = [[] for _ in fractions]
    for unit in order:
        need = lacking[:, rarest[unit]] if counts[unit].any() else lacking_samples
        best = max(range(len(parts)), key=lambda part: (round(float(need[part]), 9), lacking_samples[part]))
        parts[best] += units[unit]
        lacking[best] -= counts[unit]
        lacking_samples[best] -= len(units[unit])
    return [sorted(part) for part in parts]


def _units(count: int, groups: Sequence[str] | None) -> list[list[int]]:
    """The indices that must stay together."""
    if groups is None:
        return [[index] for index in range(count)]
    members: dict[str, list[int]] = defaultdict(list)
    for index, group in enumerate(groups):
        members[group].append(index)
    return list(members.values())
