"""The rows of a results file by workload, and what of them is compared."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from .cells import GRAPH

OURS = ("ours-none", "ours-bottleneck")
Row = dict[str, Any]
Results = dict[str, Any]


def workload_of(row: dict[str, Any]) -> tuple[str, str, int, int]:
    """Model, dtype, batch and size of a row."""
    return row["model"], row["dtype"], row["batch"], row["size"]


def of_task(results: Results, task: str) -> list[list[Row]]:
    """The rows of a task by workload."""
    rows = sorted((row for row in results["rows"] if row["task"] == task), key=workload_of)
    return [list(group) for _, group in itertools.groupby(rows, key=workload_of)]


def by_launch(rows: Sequence[Row]) -> list[list[Row]]:
    """The rows that launch every kernel, and those that replay a CUDA graph, which are compared by themselves."""
    launched = [row for row in rows if not row["implementation"].endswith(GRAPH)]
    replayed = [
        row | {"implementation": row["implementation"].removesuffix(GRAPH), "launch": ", in a CUDA graph"}
        for row in rows
        if row["implementation"].endswith(GRAPH)
    ]
    return [part for part in (launched, replayed) if any(row["implementation"] in OURS for row in part)]


def best_of_torchvision(rows: Sequence[Row]) -> Row:
    """The milliseconds of its fastest variant, and the MiB per image of its plain one, each None if not measured."""
    torchvision = [row for row in rows if row["implementation"].startswith("torchvision")]
    plain = [row for row in torchvision if row["implementation"] == "torchvision"]
    return {
        "step_ms": min((row["step_ms"] for row in torchvision if row["step_ms"]), default=None),
        "mib_per_image": min((row["mib_per_image"] for row in plain if row["mib_per_image"]), default=None),
    }


def title(row: Row) -> str:
    return f"{row['model']}, {row['dtype']}, batch {row['batch']}, {row['size']}x{row['size']}{row.get('launch', '')}"
