"""Memory of a training step against depth, image size and batch: each point from fresh processes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from densenet_efficient import EfficientDenseNet
from densenet_efficient.measure import MIB, peak_memory, peak_memory_per_image
from densenet_efficient.summary import summarize, total_costs

from .. import results as results_file
from ..implementations import configuration

DEPTHS = (40, 100, 190, 280, 400)  # of DenseNets-BC with growth rate 12, for 32x32 images
SIZES = (128, 224, 320, 448)
BATCHES = {
    "torchvision": (1, 4, 8, 12),
    "torchvision-checkpoint": (1, 8, 16, 24),
    "ours-none": (1, 8, 16, 32),
    "ours-bottleneck": (1, 8, 16, 32),
}
MODEL, SIZE = "densenet201", 224
# torchvision has no DenseNet for small images.
BY_DEPTH = ("naive", "ours-none", "ours-bottleneck")
SAVED_BY = {
    "naive": "saved_naive",
    "torchvision": "saved_naive",
    "torchvision-checkpoint": "saved_naive",
    "ours-none": "saved_none",
    "ours-bottleneck": "saved_bottleneck",
}
TARGET = 768 * MIB  # of what is saved by the larger of two batches: above the noise, below a small machine's memory
LARGEST_BATCH = 128


@dataclass(frozen=True)
class Point:
    """What is measured: MiB per image between two batches, or, against the batch, the whole process's peak."""

    against: str  # "depth", "size" or "batch"
    value: int
    implementation: str
    model: str
    size: int


def plan() -> Iterator[Point]:
    """All points, one picture after the other."""
    for depth in DEPTHS:
        for implementation in BY_DEPTH:
            yield Point("depth", depth, implementation, f"densenet-bc-{depth}-12", 32)
    for size in SIZES:
        for implementation in BATCHES:
            yield Point("size", size, implementation, MODEL, size)
    for implementation, batches in BATCHES.items():
        for batch in batches:
            yield Point("batch", batch, implementation, MODEL, SIZE)


def measure(path: Path) -> None:
    """Measure the points that ``path`` does not hold yet; it is whole after each of them."""
    results = results_file.load(path, results_file.describe_machine())
    held = {tuple(row[name] for name in Point.__dataclass_fields__) for row in results["rows"]}
    for point in plan():
        if tuple(asdict(point).values()) not in held:
            print(point, flush=True)
            results["rows"].append(measure_point(point))
            results_file.save(path, results)


def measure_point(point: Point) -> dict[str, Any]:
    """The row of a point."""
    factory = "benchmarks.implementations:build"
    arguments = {"implementation": point.implementation, "model": point.model}
    shape = (3, point.size, point.size)
    if point.against == "batch":
        mib = peak_memory(factory, arguments, shape, point.value) / MIB
        return asdict(point) | {"batches": [point.value], "mib": round(mib, 1)}
    batches = batches_for(point)
    mib = peak_memory_per_image(factory, arguments, shape, batches)
    return asdict(point) | {"batches": list(batches), "mib": round(mib, 2)}


def batches_for(point: Point) -> tuple[int, int]:
    """Two batches, one twice the other, that save enough to measure and not too much to run."""
    with torch.device("meta"):
        model = EfficientDenseNet(**configuration(point.model))
    costs = total_costs(summarize(model, (1, 3, point.size, point.size)))
    larger = min(max(TARGET // getattr(costs, SAVED_BY[point.implementation]), 2), LARGEST_BATCH)
    return max(larger // 2, 1), max(larger // 2, 1) * 2
