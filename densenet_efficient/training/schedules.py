"""Learning-rate schedules, as factors of the peak over the run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

Schedule = Literal["cosine", "steps", "constant"]


def rate_factor(schedule: Schedule, progress: float, warmup: float, milestones: Sequence[float] = (0.5, 0.75)) -> float:
    """The factor at `progress`, 0 to 1, of which the first `warmup` rises from a 25th.

    "cosine" falls to zero (Loshchilov and Hutter, 2017, arXiv:1608.03983); "steps" divides by ten at each
    milestone, which for CIFAR and SVHN are a half and three quarters of the run (arXiv:1608.06993, section 4.2).
    """
    if progress < warmup:
        return 0.04 + 0.96 * progress / warmup
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * (progress - warmup) / max(1 - warmup, 1e-9)))
    if schedule == "steps":
        return 0.1 ** sum(progress >= milestone for milestone in milestones)
    return 1.0
