"""`python -m benchmarks.run`: measure this machine into benchmarks/results/<machine>.json."""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from densenet_efficient.measure import DTYPES, TASKS, first_step_seconds

from . import results as results_file
from .cells import (
    COMPILED,
    ON_A_GPU,
    RUNTIMES,
    Cell,
    Variant,
    measure_memory,
    measure_times,
    row_key,
    variants_of,
)
from .implementations import IMPLEMENTATIONS, factory_of
from .runtimes import is_installed

MEASUREMENTS = ("times", "memory", "first-step")
FIRST_STEP = ("torchvision", "ours-none", "ours-bottleneck")
QUICK = ["--models=tiny", "--dtypes=float32", "--size=64", "--rounds=1", "--memory-batches", "8", "40"]


def main(arguments: Sequence[str]) -> None:
    options = parse(arguments)
    header = results_file.describe_machine(options.device)
    path = options.output or results_file.default_path(header)
    results = results_file.load(path, header)
    cells = plan(options)
    if "times" in options.measure:
        for cell in cells:
            _report(f"times: {cell}")
            times = measure_times(cell, variants_in(cell, options), options.device, options.rounds)
            for variant, measured in times.items():
                results_file.record(results, row_key(cell, variant), **measured)
            results_file.save(path, results)
    if "memory" in options.measure:
        for cell, variant in [(c, v) for c in cells if c.task == "train" for v in variants_in(c, options)]:
            _report(f"memory: {variant}, {cell}")
            mib_per_image = measure_memory(cell, variant, options.device, tuple(options.memory_batches))
            results_file.record(results, row_key(cell, variant), mib_per_image=mib_per_image)
            results_file.save(path, results)
    if "first-step" in options.measure:
        _report("import to first step")
        results["first_step"] = measure_first_step(options)
        results_file.save(path, results)
    _report(f"wrote {path}")


def plan(options: argparse.Namespace) -> list[Cell]:
    """The cells to measure: every task, model, dtype and batch."""
    batches = {"train": options.batches or [8], "infer": options.batches or [1, 32]}
    return [
        Cell(task, model, dtype, batch, options.size)
        for task in options.tasks
        for model in options.models
        for dtype in options.dtypes
        for batch in batches[task]
    ]


def variants_in(cell: Cell, options: argparse.Namespace) -> list[Variant]:
    """The variants of a cell. Compiling takes minutes: only the models and dtypes asked for are compiled."""
    compiled = cell.model in options.compile_models and cell.dtype in options.compile_dtypes
    names = [name for name in options.implementations if compiled or name not in COMPILED]
    missing = [name for name in names if name in RUNTIMES and not is_installed(name)]
    if missing and cell.task == "infer":
        _report(f"left out, not installed: {', '.join(missing)} (pip install 'densenet-efficient[bench]')")
    return variants_of([name for name in names if name not in missing], cell.task, cell.dtype)


def measure_first_step(options: argparse.Namespace, batch: int = 2) -> list[dict[str, Any]]:
    """Median seconds from the start of a process to the end of its first training step of the last model."""
    rows = []
    for implementation in FIRST_STEP:
        cell = Cell("train", options.models[-1], options.dtypes[0], batch, options.size)
        factory, arguments = factory_of(implementation, cell.model)
        seconds = [
            first_step_seconds(
                factory,
                arguments,
                cell.input_shape,
                batch,
                dtype=cell.dtype,
                device=options.device,
            )
            for _ in range(min(options.rounds, 3))
        ]
        rows.append(asdict(cell) | {"implementation": implementation, "seconds": round(statistics.median(seconds), 2)})
    return rows


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument("--measure", nargs="+", choices=MEASUREMENTS, default=list(MEASUREMENTS))
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--models", nargs="+", default=["densenet121", "densenet201"])
    parser.add_argument(
        "--implementations",
        nargs="+",
        choices=IMPLEMENTATIONS,
        default=[name for name in IMPLEMENTATIONS if name not in ON_A_GPU],
    )
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32", "bfloat16"])
    parser.add_argument("--batches", nargs="+", type=int, help="default: 8 in training, 1 and 32 in inference")
    parser.add_argument("--size", type=int, default=224, help="height and width of the images")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory-batches", nargs=2, type=int, default=[8, 16])
    parser.add_argument("--compile-models", nargs="*", default=["densenet121"])
    parser.add_argument("--compile-dtypes", nargs="*", choices=DTYPES, default=["float32"])
    parser.add_argument("--device", default="cpu")
    results_file.add_output(parser)
    parser.add_argument("--quick", action="store_true", help="a tiny model, to see that everything runs")
    options = parser.parse_args(arguments)
    if options.quick and options.output is None:
        parser.error("--quick measures nothing worth keeping: give it an --output of its own")
    return parser.parse_args([*QUICK, *arguments]) if options.quick else options


def _report(message: str) -> None:
    print(message, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
