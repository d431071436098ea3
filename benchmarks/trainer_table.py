"""The table of what the trainer reaches and costs, from the rows that `benchmarks.trainer` writes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from . import markdown

COLUMNS = ("what", "measured", "limit")
Row = dict[str, Any]
Cells = tuple[str, str, str]


def table(rows: Sequence[Row]) -> list[str]:
    """The rows of a results file in Markdown."""
    return markdown.table(COLUMNS, (cells for row in rows for cells in LINES[row["name"]](row)), words=3)


def _run_line(what: str, limit: str) -> Callable[[Row], list[Cells]]:
    def line(row: Row) -> list[Cells]:
        accuracy = f"{row['accuracy']:.1%} of {row['images']} held-out images"
        return [(what, f"{row['seconds']:.0f} s; {accuracy} ({row['last_accuracy']:.1%} after the last epoch)", limit)]

    return line


def _overhead_lines(row: Row) -> list[Cells]:
    time_added = row["trainer_ms"] / row["bare_ms"] - 1
    return [
        (
            "the trainer's step beside a bare one (DenseNet-121, batch 8, 224x224, float32)",
            f"{row['trainer_ms']:.0f} ms for {row['bare_ms']:.0f} ms, {time_added:+.1%}",
            "+3 %",
        ),
        (
            "its peak memory beside that of the bare step, in one process",
            f"{row['added_mib']:+.1f} MiB, {row['added_mib'] / row['bare_mib']:+.1%} of the bare step's own process",
            "+2 %",
        ),
    ]


LINES: dict[str, Callable[[Row], list[Cells]]] = {
    "mnist": _run_line("`--config mnist`: 5,000 images of MNIST, 28x28, DenseNet-BC-40-12", "300 s, 98.5 %"),
    "demo": _run_line("`--config demo`, with the naive implementation beside", "180 s, 98 %"),
    "data-path": lambda row: [
        (
            "waiting for data (DenseNet-121, batch 8, 224x224, float32, JPEG files of 500x375)",
            f"{row['wait_share']:.1%} of a step of {row['step_ms']:.0f} ms",
            "10 %",
        )
    ],
    "overhead": _overhead_lines,
    "large-images": lambda row: [
        (
            "peak memory of fine-tuning DenseNet-201 at 1024x1024, batch 4, float32",
            f"{row['ours_gib']:.2f} GiB, everything included; naive model alone {row['naive_gib']:.2f} GiB",
            "2.5 GiB",
        )
    ],
}
