"""`python -m benchmarks.planner`: the planner's predicted memory beside the measured one, over a grid of workloads.

Writes benchmarks/results/<machine>-planner.json after every workload, and goes on where it was interrupted. What is
compared is the memory of each further image: the slope of the peak between two batches, each in a fresh process. The
batches are n and 4n, where n images take 900 MiB as predicted: then what the C library keeps of freed memory, up to a
hundred MiB, is small beside what is measured.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from densenet_efficient import plan
from densenet_efficient.measure import MIB, peak_memory_per_image

from . import markdown
from . import results as results_file

COLUMNS = ("step", "model", "images", "dtype", "checkpointing", "batches", "predicted", "measured", "error")
SMALLER_MIB = 900  # of activations at the smaller batch
TIMES = 4  # as many images has the larger one
MIXED = ("bottleneck", "bottleneck", "bottleneck", "none")


@dataclass(frozen=True)
class Workload:
    """A step of a model; ``checkpointing`` is one level, or one per block."""

    task: str
    model: str
    size: int
    dtype: str
    checkpointing: str | tuple[str, ...]


GRID = [
    Workload("train", "densenet121", 224, "float32", "bottleneck"),
    Workload("train", "densenet121", 224, "float32", "none"),
    Workload("train", "densenet121", 224, "bfloat16", "bottleneck"),
    Workload("train", "densenet121", 224, "bfloat16", "none"),
    Workload("train", "densenet121", 224, "float32", MIXED),
    Workload("train", "densenet121", 224, "float64", "bottleneck"),
    Workload("train", "densenet121", 448, "float32", "bottleneck"),
    Workload("train", "densenet161", 224, "float32", "bottleneck"),
    Workload("train", "densenet169", 320, "float32", "bottleneck"),
    Workload("train", "densenet201", 224, "float32", "bottleneck"),
    Workload("train", "densenet201", 224, "float32", "none"),
    Workload("train", "densenet-bc-100-12", 32, "float32", "bottleneck"),
    Workload("train", "densenet-bc-100-12", 32, "float32", "none"),
    Workload("train", "densenet-40-12", 32, "float32", "bottleneck"),
    Workload("infer", "densenet121", 224, "float32", "bottleneck"),
    Workload("infer", "densenet121", 224, "bfloat16", "bottleneck"),
    Workload("infer", "densenet201", 224, "float32", "bottleneck"),
]


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.planner", description=__doc__)
    parser.add_argument("--models", nargs="+", help="of the grid alone these")
    results_file.add_output(parser, "planner")
    options = parser.parse_args(arguments)
    header = results_file.describe_machine()
    path = options.output or results_file.default_path(header, "planner")
    results = results_file.load(path, header)
    measured = {_key(row): row for row in results["rows"]}
    results["rows"] = []
    for workload in GRID:
        key = _key(asdict(workload))
        if key not in measured and (options.models is None or workload.model in options.models):
            print(workload, flush=True)
            batches = batches_of(workload)
            measured[key] = {"batches": batches, "measured": measure(workload, batches)}
        if key in measured:
            row = measured[key]
            commit = {"commit": row["commit"]} if "commit" in row else {}
            results["rows"].append(row_of(workload, tuple(row["batches"]), row["measured"]) | commit)
            results_file.save(path, results)
    print(f"wrote {path}", flush=True)


def batches_of(workload: Workload) -> tuple[int, int]:
    """The two batches between which memory is compared."""
    smaller = max(1, round(SMALLER_MIB / predict(workload, (64, 66))))
    return smaller, TIMES * smaller


def measure(workload: Workload, batches: tuple[int, int]) -> float:
    """MiB that each further image adds to the peak."""
    return peak_memory_per_image(
        "densenet_efficient.models:create_model",
        {"name": workload.model, "checkpointing": workload.checkpointing},
        (3, workload.size, workload.size),
        batches,
        dtype=workload.dtype,
        task=workload.task,
    )


def predict(workload: Workload, batches: tuple[int, int]) -> float:
    """The same by the planner, between these batches."""
    peaks = []
    for batch in batches:
        predicted = plan(
            workload.model,
            (batch, 3, workload.size, workload.size),
            workload.dtype,
            optimizer="sgd",
            checkpointing=workload.checkpointing,
        )
        peaks.append(predicted.training.peak if workload.task == "train" else predicted.inference.peak)
    return (peaks[1] - peaks[0]) / (batches[1] - batches[0]) / MIB


def row_of(workload: Workload, batches: tuple[int, int], measured: float) -> dict[str, Any]:
    """What the results file holds of a workload; the error is relative to what was measured."""
    predicted = predict(workload, batches)
    figures = {"predicted": round(predicted, 3), "measured": round(measured, 3), "error": predicted / measured - 1}
    return asdict(workload) | {"batches": batches} | figures | {"error": round(figures["error"], 4)}


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The rows of a results file in Markdown."""
    cells = []
    for row in rows:
        level = row["checkpointing"] if isinstance(row["checkpointing"], str) else ", ".join(row["checkpointing"])
        images, (smaller, larger) = f"{row['size']}x{row['size']}", row["batches"]
        words = [row["task"], row["model"], images, row["dtype"], level, f"{smaller}, {larger}"]
        cells.append([*words, f"{row['predicted']:.2f}", f"{row['measured']:.2f}", f"{row['error']:+.1%}"])
    return markdown.table(COLUMNS, cells, words=6)


def _key(row: dict[str, Any]) -> str:
    return json.dumps([row[name] for name in Workload.__dataclass_fields__])


if __name__ == "__main__":
    main(sys.argv[1:])
