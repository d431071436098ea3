"""Time and memory of training and inference steps, into a results file of the same rows as `benchmarks.run`'s."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import results as results_file
from ..cells import Cell, Variant, measure_memory, measure_times_together, row_key

Pair = tuple[Cell, Variant]


def memory_batches(cell: Cell, variant: Variant) -> tuple[int, int]:
    """The two batches between which memory is taken.

    Ours need larger ones: below a few hundred MiB the blocks that the C library keeps make a slope too small.
    """
    if variant.implementation.startswith("ours"):
        return 32, 64
    return (8, 16) if cell.size <= 224 else (2, 4)


def measure_steps(path: Path, pairs: Sequence[Pair], rounds: int) -> None:
    """Measure what ``path`` does not hold yet: memory one by one, then all the times in turn, over so many rounds."""
    results = results_file.load(path, results_file.describe_machine())
    for cell, variant in pairs:
        if cell.task == "train" and not holds(results, (cell, variant), "mib_per_image"):
            print(f"memory: {variant}, {cell}", flush=True)
            mib_per_image = measure_memory(cell, variant, batches=memory_batches(cell, variant))
            results_file.record(results, row_key(cell, variant), mib_per_image=mib_per_image)
            results_file.save(path, results)
    if not all(holds(results, pair, "step_ms") for pair in pairs):
        print("times", flush=True)
        for (cell, variant), measured in measure_times_together(pairs, rounds=rounds).items():
            results_file.record(results, row_key(cell, variant), **measured)
        results["rounds"] = rounds
        results_file.save(path, results)


def holds(results: dict[str, Any], pair: Pair, figure: str) -> bool:
    """Whether this figure of the pair has been measured."""
    key = row_key(*pair)
    return any(row[figure] is not None and key.items() <= row.items() for row in results["rows"])
