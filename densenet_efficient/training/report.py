"""What a training run reports: its metrics file and its final table."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.table import Table

from densenet_efficient.training.comparison import Comparison, PerImplementation
from densenet_efficient.training.files import atomic_write
from densenet_efficient.training.loop import EpochRecord


def write_metrics(
    path: Path,
    *,
    options: Mapping[str, Any],
    config: Mapping[str, Any],
    history: list[EpochRecord],
    comparison: Comparison,
    mib_per_image_at_depth: Mapping[int, PerImplementation],
) -> None:
    """Write all figures of a run, with the versions that gave them, as JSON."""
    packages = ("densenet-efficient", "torch", "torchvision")
    metrics = {
        "options": options,
        "config": config,
        "history": [asdict(record) for record in history],
        "comparison": asdict(comparison),
        "mib_per_image_at_depth": mib_per_image_at_depth,
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
    }
    with atomic_write(path) as file:
        file.write(json.dumps(metrics, indent=2, default=str).encode())


def comparison_table(comparison: Comparison) -> Table:
    """One row per figure; the last column is how many times less the efficient implementation needs."""
    table = Table(title="The same network with the same weights, both measured in this run")
    table.add_column("")
    for column in ("naive", "efficient", "naive / efficient"):
        table.add_column(column, justify="right")
    accuracy = comparison.accuracy
    verdict = "equal" if accuracy["naive"] == accuracy["efficient"] else "NOT EQUAL"
    table.add_row("held-out accuracy", f"{accuracy['naive']:.2%}", f"{accuracy['efficient']:.2%}", verdict)
    for name, unit, cost in (
        ("time per step", "ms", comparison.step_ms),
        ("peak memory per image", "MiB", comparison.mib_per_image),
    ):
        naive, efficient = cost["naive"], cost["efficient"]
        table.add_row(name, f"{naive:.2f} {unit}", f"{efficient:.2f} {unit}", f"{naive / efficient:.1f}x")
    return table
