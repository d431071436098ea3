"""What is measured together: the implementations of one task, model, dtype and batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from densenet_efficient.measure import make_forward, make_step, peak_memory_per_image, step_times

from .implementations import build

# Layout is part of an implementation: torchvision is timed in both, since neither is always the faster.
LAYOUTS = {
    "torchvision": ("channels-last", "contiguous"),
    "onnxruntime": ("contiguous",),
    "openvino": ("contiguous",),
}
TRAINING_ONLY = (
    "torchvision-checkpoint",
    "block-checkpoint",
    "selective-checkpoint",
    "compile-budget-0.5",
    "compile-budget-0.0",
    "ours-bottleneck",
)
RUNTIMES = {"onnxruntime": ("float32",), "openvino": ("float32", "bfloat16")}  # of inference alone, with their dtypes
COMPILED = ("compile", "compile-budget-0.5", "compile-budget-0.0", "compile-max-autotune")
ON_A_GPU = ("compile-max-autotune",)  # pays there alone
# Of an inference on the CPU, before it is timed: threads of the runtime before it spin on for up to 0.2 s, during which
# another one takes half as long again.
SECONDS_TO_SETTLE = 0.5
GRAPH = "-graph"  # the same implementation, its step captured in a CUDA graph and replayed


@dataclass(frozen=True)
class Cell:
    """One workload: `batch` images of `size` x `size` pixels; bfloat16 and float16 mean autocast."""

    task: str
    model: str
    dtype: str
    batch: int
    size: int

    @property
    def input_shape(self) -> tuple[int, int, int]:
        return (3, self.size, self.size)


@dataclass(frozen=True)
class Variant:
    """An implementation in a memory layout, "channels-last" or "contiguous"."""

    implementation: str
    layout: str


def variants_of(implementations: Sequence[str], task: str, dtype: str) -> list[Variant]:
    """The variants of these implementations that have this task and dtype."""
    without_dtype = [name for name, dtypes in RUNTIMES.items() if dtype not in dtypes]
    left_out = [*RUNTIMES] if task == "train" else [*TRAINING_ONLY, *without_dtype]
    return [
        Variant(implementation, layout)
        for implementation in implementations
        if implementation not in left_out
        for layout in LAYOUTS.get(implementation, ("channels-last",))
    ]


def make_timed(cell: Cell, variant: Variant, device: str) -> dict[str, Callable[[], Tensor]]:
    """The functions to time: "forward_ms", and "step_ms" where a step is more than its forward."""
    model = build(variant.implementation, cell.model)
    make = {"forward_ms": make_forward} | ({"step_ms": make_step} if cell.task == "train" else {})
    return {
        name: maker(
            model,
            cell.input_shape,
            cell.batch,
            dtype=cell.dtype,
            task=cell.task,
            device=device,
            channels_last=variant.layout == "channels-last",
        )
        for name, maker in make.items()
    }


def measure_times(
    cell: Cell, variants: Sequence[Variant], device: str = "cpu", rounds: int = 5
) -> dict[Variant, dict[str, float]]:
    """`forward_ms`, `step_ms` and `images_per_second` of each variant, all of them timed in turn."""
    times = measure_times_together([(cell, variant) for variant in variants], device, rounds)
    return {variant: measured for (_, variant), measured in times.items()}


def measure_times_together(
    pairs: Sequence[tuple[Cell, Variant]], device: str = "cpu", rounds: int = 5
) -> dict[tuple[Cell, Variant], dict[str, float]]:
    """The same of variants in several cells, all of them timed in turn."""
    torch.compiler.reset()
    timed = {(pair, name): function for pair in pairs for name, function in make_timed(*pair, device).items()}
    is_disturbed = device == "cpu" and any(cell.task == "infer" for cell, _ in pairs)
    medians = step_times(timed, rounds, settle=SECONDS_TO_SETTLE if is_disturbed else 0.0)
    times = {}
    for pair in pairs:
        forward_ms = medians[pair, "forward_ms"]
        step_ms = medians.get((pair, "step_ms"), forward_ms)
        times[pair] = {
            "step_ms": round(step_ms, 2),
            "forward_ms": round(forward_ms, 2),
            "images_per_second": round(pair[0].batch / step_ms * 1e3, 2),
        }
    return times


def measure_memory(cell: Cell, variant: Variant, device: str = "cpu", batches: tuple[int, int] = (8, 24)) -> float:
    """MiB per image of this variant at the cell's peak; the cell's own batch plays no part."""
    mib_per_image = peak_memory_per_image(
        "benchmarks.implementations:build",
        {"implementation": variant.implementation, "model": cell.model},
        cell.input_shape,
        batches,
        dtype=cell.dtype,
        task=cell.task,
        device=device,
        channels_last=variant.layout == "channels-last",
    )
    return round(mib_per_image, 2)


def row_key(cell: Cell, variant: Variant) -> dict[str, str | int]:
    """What identifies the row of a results file."""
    return asdict(cell) | asdict(variant)
