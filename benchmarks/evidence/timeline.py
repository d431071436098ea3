"""The resident memory of a process through one training step, sampled while it runs."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks import results as results_file
from densenet_efficient.measure import MIB, make_forward

from ..implementations import build
from .processes import run_in_fresh_process, status_bytes

IMPLEMENTATIONS = ("torchvision", "torchvision-checkpoint", "ours-none", "ours-bottleneck")
STEP = {"model": "densenet201", "size": 224, "batch": 8, "dtype": "float32"}
PHASES = ("forward", "backward", "optimizer")
INTERVAL = 1e-3  # seconds
POINTS = 300  # kept of a step, each the highest of its share of the samples


def measure(path: Path) -> None:
    """Measure every implementation into ``path``, each in a process of its own."""
    header = results_file.describe_machine()
    rows = []
    for implementation in IMPLEMENTATIONS:
        print(f"timeline: {implementation}", flush=True)
        rows.append(run_in_fresh_process(__name__, STEP | {"implementation": implementation}))
    results_file.save(path, {"header": header, "rows": rows})


def trace(request: Mapping[str, Any]) -> dict[str, Any]:
    """One step after a first one: milliseconds and MiB above what the process held before it."""
    model = build(request["implementation"], request["model"])
    batch, size = request["batch"], request["size"]
    options: dict[str, Any] = {"dtype": request["dtype"], "task": "train", "device": "cpu", "channels_last": True}
    forward = make_forward(model, (3, size, size), batch, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    labels = torch.arange(batch) % 10
    samples: list[tuple[float, int]] = []
    finished = threading.Event()

    def sample() -> None:
        while not finished.wait(INTERVAL):
            samples.append((time.perf_counter(), status_bytes("VmRSS")))

    def step() -> list[float]:
        moments = [time.perf_counter()]
        loss = F.cross_entropy(forward(), labels)
        moments.append(time.perf_counter())
        loss.backward()
        moments.append(time.perf_counter())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return [*moments, time.perf_counter()]

    step()
    before = status_bytes("VmRSS")
    sampler = threading.Thread(target=sample)
    sampler.start()
    moments = step()
    finished.set()
    sampler.join()
    start, *ends = moments
    within = [(moment - start, held - before) for moment, held in samples if start <= moment <= ends[-1]]
    return dict(request) | {
        "phases_ms": {name: round((end - start) * 1e3) for name, end in zip(PHASES, ends, strict=True)},
        "samples": len(within),
        "timeline": [[round(moment * 1e3), round(held / MIB)] for moment, held in highest(within, POINTS)],
    }


def highest(samples: list[tuple[float, int]], count: int) -> list[tuple[float, int]]:
    """At most ``count`` of the samples: the highest of each run of neighbours."""
    length = -(-len(samples) // count) or 1
    runs = (samples[start : start + length] for start in range(0, len(samples), length))
    return [max(run, key=lambda sample: sample[1]) for run in runs]


if __name__ == "__main__":
    print(json.dumps(trace(json.loads(sys.argv[1]))))
