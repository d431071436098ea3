"""The largest square image on which DenseNet-201 trains, one image a batch, in a process of 8 GiB.

The size is predicted from the memory of smaller images, then tried: a process that may hold no more than the limit
takes a whole training step, or fails. What is reported was trained, and the next size was refused.
"""

from __future__ import annotations

import json
import math
import resource
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from densenet_efficient.measure import MIB, make_step, status_bytes

from .. import results as results_file
from ..implementations import build
from .processes import run_in_fresh_process

MODEL = "densenet201"
LIMIT = 8192  # MiB
STRIDE = 64  # sizes are multiples of it
# Two sizes to predict from: large enough for the slope to be that of the limit.
PROBES = {
    "torchvision": (512, 768),
    "torchvision-checkpoint": (768, 1152),
    "ours-none": (1024, 1536),
    "ours-bottleneck": (1536, 2304),
}


def measure(path: Path) -> None:
    """Find the size of every implementation that ``path`` does not hold yet."""
    results = results_file.load(path, results_file.describe_machine())
    for implementation in PROBES:
        if implementation not in [row["implementation"] for row in results["rows"]]:
            results["rows"].append(measure_one(implementation))
            results_file.save(path, results)


def measure_one(implementation: str) -> dict[str, Any]:
    """The row of an implementation: what was predicted, what was trained, what was refused."""
    peaks: dict[int, float] = {}

    def trains(size: int) -> bool:
        try:
            peaks[size] = step_peak(implementation, size, LIMIT)
        except MemoryError:
            print(f"{implementation}: {size}x{size} does not fit", flush=True)
            return False
        print(f"{implementation}: {size}x{size} peaks at {peaks[size]:.0f} MiB", flush=True)
        return True

    smaller, larger = PROBES[implementation]
    predicted = predict({size: step_peak(implementation, size, None) for size in (smaller, larger)}, LIMIT)
    print(f"{implementation}: {predicted}x{predicted} predicted", flush=True)
    largest = largest_that(trains, predicted // STRIDE * STRIDE, STRIDE)
    return {
        "model": MODEL,
        "implementation": implementation,
        "dtype": "float32",
        "limit_mib": LIMIT,
        "predicted": predicted,
        "largest": largest,
        "peak_mib": peaks[largest],
        "refused": largest + STRIDE,
    }


def predict(peaks: Mapping[int, float], limit: float) -> int:
    """The size whose peak is ``limit``, on the line through two peaks over the number of pixels."""
    (smaller, low), (larger, high) = sorted(peaks.items())
    slope = (high - low) / (larger**2 - smaller**2)
    return int(math.sqrt(smaller**2 + (limit - low) / slope))


def largest_that(succeeds: Callable[[int], bool], start: int, stride: int) -> int:
    """The largest multiple of ``stride`` that succeeds, with the next one tried too; from a good guess."""
    size = start
    if succeeds(size):
        while succeeds(size + stride):
            size += stride
        return size
    while not succeeds(size - stride):
        size -= stride
    return size - stride


def step_peak(implementation: str, size: int, limit: float | None) -> float:
    """The peak resident MiB of a training step in a fresh process.

    Raises:
        MemoryError: it needed more than ``limit`` MiB.
    """
    request = {"implementation": implementation, "size": size, "limit_mib": limit}
    return round(float(run_in_fresh_process(__name__, request)), 1)


def train_once(request: Mapping[str, Any]) -> float:
    """The peak of this process, in MiB, after one step under the limit."""
    if request["limit_mib"] is not None:
        confine(int(request["limit_mib"] * MIB))
    model, size = build(request["implementation"], MODEL), request["size"]
    loss = make_step(model, (3, size, size), 1)()
    assert loss.isfinite()
    return status_bytes("VmHWM") / MIB


def confine(limit: int) -> None:
    """Let this process hold no more than ``limit`` bytes: what it may still map is what it does not hold yet.

    RLIMIT_DATA counts private memory when it is mapped, whether or not it is touched.
    """
    allowed = status_bytes("VmData") + limit - status_bytes("VmRSS")
    resource.setrlimit(resource.RLIMIT_DATA, (allowed, allowed))


if __name__ == "__main__":
    print(json.dumps(train_once(json.loads(sys.argv[1]))))
