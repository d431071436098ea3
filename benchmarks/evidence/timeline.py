"""The live memory through one training step: what tensors hold, at every allocation and release."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile, record_function

from densenet_efficient.measure import MIB, make_forward

from .. import results as results_file
from ..implementations import build
from .processes import run_in_fresh_process

IMPLEMENTATIONS = ("torchvision", "torchvision-checkpoint", "ours-none", "ours-bottleneck")
STEP = {"model": "densenet201", "size": 224, "batch": 8, "dtype": "float32"}
PHASES = ("forward", "backward", "optimizer")
POINTS = 300  # kept of a step, each the highest of its share of the moments
Moment = tuple[float, int]  # nanoseconds since the step began, bytes


def measure(path: Path) -> None:
    """Measure every implementation into ``path``, each in a process of its own."""
    header = results_file.describe_machine()
    rows = []
    for implementation in IMPLEMENTATIONS:
        print(f"timeline: {implementation}", flush=True)
        rows.append(run_in_fresh_process(__name__, STEP | {"implementation": implementation}))
    results_file.save(path, {"header": header, "rows": rows})


def trace(request: Mapping[str, Any]) -> dict[str, Any]:
    """One step after a first one: milliseconds, and the MiB of tensors that did not live before it."""
    model = build(request["implementation"], request["model"])
    batch, size = request["batch"], request["size"]
    options: dict[str, Any] = {"dtype": request["dtype"], "task": "train", "device": "cpu", "channels_last": True}
    forward = make_forward(model, (3, size, size), batch, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    labels = torch.arange(batch) % 10

    def step() -> None:
        with record_function("forward"):
            loss = F.cross_entropy(forward(), labels)
        with record_function("backward"):
            loss.backward()
        with record_function("optimizer"):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    return dict(request) | describe(*live_memory(profiled))


def live_memory(profiled: profile) -> tuple[list[Moment], dict[str, float]]:
    """What lives after every allocation and release beyond what lived before the step, and when each phase ends."""
    events: list[Any] = profiled.profiler.kineto_results.events()  # type: ignore[union-attr]
    phases = {event.name(): event for event in events if event.name() in PHASES}
    start = phases[PHASES[0]].start_ns()
    moments: list[Moment] = []
    held = 0
    for event in sorted((event for event in events if event.name() == "[memory]"), key=lambda event: event.start_ns()):
        held += event.nbytes()
        moments.append((event.start_ns() - start, held))
    return moments, {name: phase.start_ns() + phase.duration_ns() - start for name, phase in phases.items()}


def describe(moments: list[Moment], ends: Mapping[str, float]) -> dict[str, Any]:
    """The figures of a step, and the course of its memory at `POINTS` of its moments."""
    return {
        "phases_ms": {name: round(ends[name] / 1e6) for name in PHASES},
        "kept_mib": round([held for moment, held in moments if moment <= ends["forward"]][-1] / MIB, 1),
        "peak_mib": round(max(held for _, held in moments) / MIB, 1),
        "timeline": [[round(moment / 1e6, 1), round(held / MIB, 1)] for moment, held in highest(moments, POINTS)],
    }


def highest(moments: list[Moment], count: int) -> list[Moment]:
    """At most ``count`` of the moments: the highest of each run of neighbours."""
    length = -(-len(moments) // count) or 1
    runs = (moments[start : start + length] for start in range(0, len(moments), length))
    return [max(run, key=lambda moment: moment[1]) for run in runs]


if __name__ == "__main__":
    print(json.dumps(trace(json.loads(sys.argv[1]))))
