"""Time against memory: every way of training the same DenseNet with less memory, all timed in turn."""

from __future__ import annotations

from pathlib import Path

from ..cells import Cell, Variant
from .steps import measure_steps

CELL = Cell("train", "densenet121", "float32", batch=8, size=224)
IMPLEMENTATIONS = (
    "torchvision",
    "torchvision-checkpoint",
    "block-checkpoint",
    "selective-checkpoint",
    "compile",
    "compile-budget-0.5",
    "compile-budget-0.0",
    "ours-none",
    "ours-bottleneck",
)
ROUNDS = 5


def measure(path: Path) -> None:
    """Measure what ``path`` does not hold yet. Compiling takes minutes."""
    pairs = [(CELL, Variant(implementation, "channels-last")) for implementation in IMPLEMENTATIONS]
    measure_steps(path, pairs, ROUNDS)
