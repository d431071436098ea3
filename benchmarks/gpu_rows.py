"""`python -m benchmarks.gpu_rows FILE`: times and memory of a GPU, the most telling first.

Every row is written as soon as it is there, and none is measured twice: a run that was cut off is taken up again.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from densenet_efficient.measure import MIB, make_forward, make_step

from . import results as results_file
from .cells import GRAPH, Cell, Variant, row_key
from .implementations import build

EAGER = ("torchvision", "ours-none", "ours-bottleneck")
GRAPHS = tuple(name + GRAPH for name in EAGER)
INFERENCE = ("torchvision", "ours-none", "torchvision-graph", "ours-none-graph")
MODELS = ("densenet201", "densenet121")
SIZE = 224
WARM_UP = 3


@dataclass(frozen=True)
class Measurement:
    """What is measured, of which implementation in which cell; the cell's batch plays no part in memory."""

    kind: str  # a key of MEASURES
    cell: Cell
    variant: Variant


def plan(dtype: str = "bfloat16") -> list[Measurement]:
    """All measurements, in the order of their importance. Compiling takes minutes and comes last."""
    return [
        *_each("times", "train", MODELS, 128, (*EAGER, *GRAPHS), dtype),
        *_each("memory", "train", MODELS, 128, (*EAGER, "torchvision-checkpoint"), dtype),
        *_each("times", "train", MODELS, 8, GRAPHS, dtype),
        *_each("times", "infer", MODELS, 128, INFERENCE, dtype),
        *_each("largest_batch", "train", MODELS[:1], 0, ("torchvision", "ours-bottleneck", "ours-none"), dtype),
        *_each("times", "train", MODELS, 256, EAGER, dtype),
        *_each("times", "train", MODELS, 8, EAGER, dtype),
        *_each("times", "train", MODELS, 128, ("compile-max-autotune",), dtype),
        *_each("times", "infer", MODELS, 128, ("compile-max-autotune",), dtype),
    ]


def _each(
    kind: str, task: str, models: Sequence[str], batch: int, implementations: Sequence[str], dtype: str
) -> Iterator[Measurement]:
    for model in models:
        for implementation in implementations:
            yield Measurement(kind, Cell(task, model, dtype, batch, SIZE), Variant(implementation, "channels-last"))


def measure_times(cell: Cell, variant: Variant, device: str, seconds: float = 0.5) -> dict[str, float]:
    """The columns of a row; the forward alone only where it is not captured."""
    step = make(make_step, cell, variant, cell.batch, device)
    if variant.implementation.endswith(GRAPH):
        return _row(cell, time_step(captured(step), seconds))
    step_ms = time_step(step, seconds)
    if cell.task == "infer":
        return _row(cell, step_ms, step_ms)
    return _row(cell, step_ms, time_step(make(make_forward, cell, variant, cell.batch, device), seconds / 2))


def _row(cell: Cell, step_ms: float, forward_ms: float | None = None) -> dict[str, float]:
    forward = {} if forward_ms is None else {"forward_ms": round(forward_ms, 3)}
    return {"step_ms": round(step_ms, 3), **forward, "images_per_second": round(cell.batch / step_ms * 1e3, 1)}


def make(
    maker: Callable[..., Callable[[], Tensor]], cell: Cell, variant: Variant, batch: int, device: str
) -> Callable[[], Tensor]:
    model = build(variant.implementation.removesuffix(GRAPH), cell.model)
    channels_last = variant.layout == "channels-last"
    options = {"dtype": cell.dtype, "task": cell.task, "device": device, "channels_last": channels_last}
    return maker(model, cell.input_shape, batch, **options)


def captured(step: Callable[[], object]) -> Callable[[], None]:
    """The replay of ``step`` as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def time_step(step: Callable[[], object], seconds: float, rounds: int = 5) -> float:
    """Median milliseconds of a step, over rounds of several steps that are launched without waiting for each other."""
    for _ in range(WARM_UP):
        step()
    once = _milliseconds(step, 1)
    steps = max(1, min(100, round(seconds * 1e3 / rounds / once)))
    return statistics.median(_milliseconds(step, steps) for _ in range(rounds))


def _milliseconds(step: Callable[[], object], steps: int) -> float:
    _synchronize()
    start = time.perf_counter()
    for _ in range(steps):
        step()
    _synchronize()
    return (time.perf_counter() - start) * 1e3 / steps


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_bytes(cell: Cell, variant: Variant, batch: int, device: str, steps: int = 3) -> int:
    """The allocator's peak in the last step, which compiles, records and initialises nothing any more."""
    step = make(make_step, cell, variant, batch, device)
    for _ in range(steps - 1):
        step()
    torch.cuda.reset_peak_memory_stats(device)
    step()
    _synchronize()
    return torch.cuda.max_memory_allocated(device)


def measure_memory(cell: Cell, variant: Variant, device: str, batches: tuple[int, int] = (32, 128)) -> dict[str, float]:
    """MiB that each further image of a batch adds to the peak."""
    smaller, larger = (peak_bytes(cell, variant, batch, device) for batch in batches)
    return {"mib_per_image": round((larger - smaller) / (batches[1] - batches[0]) / MIB, 2)}


def measure_largest_batch(cell: Cell, variant: Variant, device: str) -> dict[str, float]:
    """The largest batch whose step runs in this card's memory, to some 2 %: judged from the slope, then tried."""
    per_image = measure_memory(cell, variant, device)["mib_per_image"] * MIB
    release_memory()
    batch = int(torch.cuda.mem_get_info(device)[0] / per_image)
    while batch > 0:
        try:
            peak_bytes(cell, variant, batch, device)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            batch = int(batch * 0.98)
        else:
            return {"largest_batch": batch}
        release_memory()
    raise RuntimeError("not even one image fits")


def is_out_of_memory(error: RuntimeError) -> bool:
    """Of torch's allocator; or of CUDA, where a kernel is loaded or launched, in other words and of another type."""
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error)


MEASURES: dict[str, Callable[[Cell, Variant, str], dict[str, float]]] = {
    "times": measure_times,
    "memory": measure_memory,
    "largest_batch": measure_largest_batch,
}
COLUMN = {"times": "step_ms", "memory": "mib_per_image"}


def release_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_rows", description=__doc__)
    parser.add_argument("file", type=Path)
    options = parser.parse_args(arguments)
    run(options.file, plan(), "cuda")


def run(path: Path, measurements: Sequence[Measurement], device: str) -> None:
    """Measure what ``path`` does not hold yet, neither as a figure nor as a failure.

    Raises RuntimeError, once it is written down, for a failure that leaves the GPU unusable for this process.
    """
    results = results_file.load(path, results_file.describe_machine(device))
    results.setdefault("largest_batch", [])
    results.setdefault("failed", [])
    for measurement in measurements:
        if is_known(results, measurement):
            continue
        print(f"{measurement.kind}: {measurement.variant.implementation}, {measurement.cell}", flush=True)
        started = time.perf_counter()
        torch.backends.cudnn.benchmark = measurement.kind == "times"  # its search takes memory
        try:
            measured = MEASURES[measurement.kind](measurement.cell, measurement.variant, device)
        except Exception as error:
            reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            results["failed"].append(describe(measurement) | {"reason": reason})
            results_file.save(path, results)
            print(f"  failed: {reason}", flush=True)
            _synchronize()  # raises where the failure was one of the device
        else:
            keep(results, measurement, measured)
            results_file.save(path, results)
            print(f"  {measured}, {time.perf_counter() - started:.0f} s", flush=True)
        torch.compiler.reset()
        release_memory()


def describe(measurement: Measurement) -> dict[str, Any]:
    return {"kind": measurement.kind, **row_key(measurement.cell, measurement.variant)}


def keep(results: dict[str, Any], measurement: Measurement, measured: dict[str, float]) -> None:
    if measurement.kind == "largest_batch":
        row = row_key(measurement.cell, measurement.variant)
        others = [other for other in results["largest_batch"] if not _is_largest(other, row)]
        results["largest_batch"] = [*others, row | {"batch": measured["largest_batch"]}]
    else:
        results_file.record(results, row_key(measurement.cell, measurement.variant), **measured)


def is_known(results: dict[str, Any], measurement: Measurement) -> bool:
    """Whether the present commit has measured it, or failed to."""
    key = row_key(measurement.cell, measurement.variant)
    if any(all(row[name] == value for name, value in describe(measurement).items()) for row in results["failed"]):
        return True
    if measurement.kind == "largest_batch":
        return any(_is_largest(row, key) and "commit" not in row for row in results["largest_batch"])
    rows = [row for row in results["rows"] if all(row[name] == value for name, value in key.items())]
    return any(results_file.is_current(row, COLUMN[measurement.kind]) for row in rows)


def _is_largest(row: dict[str, Any], key: dict[str, Any]) -> bool:
    """Whether a row of largest batches is that of a measurement, whose own batch says nothing."""
    return all(row[name] == value for name, value in key.items() if name != "batch")


if __name__ == "__main__":
    main(sys.argv[1:])
