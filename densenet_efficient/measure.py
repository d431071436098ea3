"""Time and peak memory of a step, measured from outside the model.

Times are medians of steps taken in turn in one process, because a machine's speed drifts. Memory is the slope
of a fresh process's peak between two batch sizes, so that weights, libraries and the interpreter cancel out.
The allocator keeps its default settings: what it holds back is memory that its user does not have.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TASKS = ("train", "infer")
DTYPES = ("float32", "float64", "bfloat16", "float16")
MIB = 2**20
Name = TypeVar("Name")


def make_step(
    model: nn.Module,
    input_shape: tuple[int, ...],  # channels, [depth,] height, width
    batch: int,
    *,
    dtype: str = "float32",
    task: str = "train",
    device: str = "cpu",
    channels_last: bool = True,
) -> Callable[[], Tensor]:
    """Place `model` on `device` and return a function that runs one step of it on `batch` random images.

    A training step is forward, cross-entropy, backward and plain SGD, and returns the loss; an inference step
    is the forward in eval mode, and returns the outputs, `[batch, classes]` or, of a network for segmentation,
    `[batch, classes, height, width]`. "float32" and "float64" are the model's dtype, "bfloat16" and "float16"
    autocast of a float32 model; `channels_last` is for images alone. Raises ValueError for other names.
    """
    forward = make_forward(
        model, input_shape, batch, dtype=dtype, task=task, device=device, channels_last=channels_last
    )
    if task == "infer":
        return forward
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def train() -> Tensor:
        logits = forward()
        labels = torch.arange(batch, device=device) % logits.shape[1]
        pixels = logits.shape[2:]
        loss = F.cross_entropy(logits, labels.view(-1, *[1] * len(pixels)).expand(-1, *pixels))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return train


def make_forward(
    model: nn.Module,
    input_shape: tuple[int, ...],  # channels, [depth,] height, width
    batch: int,
    *,
    dtype: str,
    task: str,
    device: str,
    channels_last: bool,
) -> Callable[[], Tensor]:
    """The forward of `make_step` alone, with the same arguments; in training it records for a backward."""
    _check_choice("task", task, TASKS)
    _check_choice("dtype", dtype, DTYPES)
    training, autocast = task == "train", dtype in ("bfloat16", "float16")
    step_dtype: torch.dtype = getattr(torch, dtype)
    model_dtype = torch.float32 if autocast else step_dtype
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    model.to(device=device, dtype=model_dtype, memory_format=memory_format)  # type: ignore[call-overload]
    model.train(training)
    images = torch.rand(batch, *input_shape, dtype=model_dtype, device=device).to(memory_format=memory_format)
    precision = functools.partial(torch.autocast, torch.device(device).type, dtype=step_dtype, enabled=autocast)

    def forward() -> Tensor:
        with torch.inference_mode(not training), precision():
            return model(images)

    return forward


def step_times(
    steps: Mapping[Name, Callable[[], object]], rounds: int = 5, warmup: int = 1, settle: float = 0.0
) -> dict[Name, float]:
    """Median milliseconds of each step, over `rounds` rounds that run all of them in turn: A B A B.

    `warmup` rounds come first and are not timed. CUDA work is waited for. Before a step is timed it runs untimed for
    `settle` seconds, in which what the step before it left behind goes: its data in the caches, its spinning threads.
    Raises ValueError for `rounds` below 1 and a negative `warmup`.
    """
    if rounds < 1 or warmup < 0:
        raise ValueError(f"expected rounds >= 1 and warmup >= 0, got rounds={rounds}, warmup={warmup}")
    for _ in range(warmup):
        for step in steps.values():
            step()
    times: dict[Name, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            settled = time.perf_counter() + settle
            while time.perf_counter() < settled:
                step()
            times[name].append(_milliseconds(step))
    return {name: statistics.median(values) for name, values in times.items()}


def peak_memory_per_image(
    factory: str,
    arguments: Mapping[str, Any],
    input_shape: tuple[int, ...],  # channels, [depth,] height, width
    batches: tuple[int, int] = (8, 24),
    dtype: str = "float32",
    task: str = "train",
    device: str = "cpu",
    channels_last: bool = True,
) -> float:
    """MiB that each further image of a batch adds to the peak memory of `task`.

    `factory` is "module:function"; `function(**arguments)` gives the model, and `arguments` must be JSON.
    Each of the two batches, the smaller one first, runs in a fresh process, and raises as `peak_memory` does; other
    batches are a ValueError. Pages of files do not count: how much of its libraries a process holds depends on what
    the system has read before.
    """
    smaller, larger = batches
    if not 0 < smaller < larger:
        raise ValueError(f"expected batches (smaller, larger) with 0 < smaller < larger, got {batches}")
    options = {"dtype": dtype, "task": task, "device": device, "channels_last": channels_last}
    peaks = (_peak_and_files(factory, arguments, input_shape, batch, options) for batch in batches)
    smaller_peak, larger_peak = (peak - files for peak, files in peaks)
    return (larger_peak - smaller_peak) / (larger - smaller) / MIB


def peak_memory(
    factory: str,
    arguments: Mapping[str, Any],
    input_shape: tuple[int, ...],  # channels, [depth,] height, width
    batch: int,
    **options: Any,
) -> int:
    """Peak bytes of a fresh process during the second step of `make_step(..., **options)`.

    The first step compiles and initialises, so it is left out. On the CPU this is the peak resident set
    (Linux only), on CUDA the allocator's peak. Raises RuntimeError if the process fails.
    """
    return _peak_and_files(factory, arguments, input_shape, batch, options)[0]


def _peak_and_files(
    factory: str, arguments: Mapping[str, Any], input_shape: tuple[int, ...], batch: int, options: Mapping[str, Any]
) -> tuple[int, int]:
    """The bytes of `peak_memory`, and those among them of files, such as libraries; on CUDA none."""
    answer, _ = _run_in_fresh_process("peak", factory, arguments, input_shape, batch, options)
    peak, files = map(int, answer.split())
    return peak, files


def first_step_seconds(
    factory: str,
    arguments: Mapping[str, Any],
    input_shape: tuple[int, ...],  # channels, [depth,] height, width
    batch: int,
    **options: Any,
) -> float:
    """Seconds a fresh process takes to start, import, build the model and run one step; raises as `peak_memory`."""
    return _run_in_fresh_process("first", factory, arguments, input_shape, batch, options)[1]


def _run_in_fresh_process(
    measurement: str,
    factory: str,
    arguments: Mapping[str, Any],
    input_shape: tuple[int, ...],
    batch: int,
    options: Mapping[str, Any],
) -> tuple[str, float]:
    """The last line that this file prints as a program, and after how many seconds it came.

    The process imports from where this one does.
    """
    step = {"input_shape": input_shape, "batch": batch, **options}
    request = json.dumps({"measurement": measurement, "factory": factory, "arguments": dict(arguments), "step": step})
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "densenet_efficient.measure", request]
    start = time.perf_counter()
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment) as process,
    ):
        assert process.stdout is not None
        answers = [(line.rstrip(), time.perf_counter() - start) for line in process.stdout]
        if process.wait() != 0:
            errors.seek(0)
            reason = (errors.read().strip().splitlines() or [f"exit status {process.returncode}"])[-1]
            raise RuntimeError(f"measuring {factory} with batch {batch} in a fresh process failed: {reason}")
    return answers[-1]


def build_model(factory: str, arguments: Mapping[str, Any]) -> nn.Module:
    """The model that ``factory``, "module:function", makes of ``arguments``."""
    module, function = factory.split(":")
    model: nn.Module = getattr(importlib.import_module(module), function)(**arguments)
    return model


def _serve(request: Mapping[str, Any]) -> tuple[int, int]:
    """Run the requested steps in this process and return its `_peak_bytes`; 0 for the first step alone."""
    model = build_model(request["factory"], request["arguments"])
    step = make_step(model, **request["step"])
    step()
    if request["measurement"] == "first":
        return 0, 0
    return _peak_bytes(step, on_cuda=next(model.parameters()).is_cuda)


def _peak_bytes(step: Callable[[], object], on_cuda: bool) -> tuple[int, int]:
    """The peak of one step, and how much of it are pages of files."""
    if on_cuda:
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated(), 0
    reset_peak_resident()
    step()
    return status_bytes("VmHWM"), status_bytes("RssFile")


def reset_peak_resident() -> None:
    """Lets this process's peak of resident memory begin anew (Linux only)."""
    Path("/proc/self/clear_refs").write_text("5")  # of VmHWM, see proc(5)


def status_bytes(name: str) -> int:
    """What the kernel says of this process: "VmRSS" held now, "RssFile" of it of files, "VmHWM" held at most,
    "VmData" mapped (Linux only).

    Not getrusage: its ru_maxrss survives exec, so a child could report the peak of its parent.
    """
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def _milliseconds(step: Callable[[], object]) -> float:
    _synchronize()
    start = time.perf_counter()
    step()
    _synchronize()
    return (time.perf_counter() - start) * 1e3


def _synchronize() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _check_choice(what: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"unknown {what} {value!r}; expected one of {', '.join(choices)}")


if __name__ == "__main__":
    print(*_serve(json.loads(sys.argv[1])), flush=True)
