"""`python -m benchmarks.gpu_kernels FILE`: every operation of a GPU's backends by itself, against a copy's bandwidth.

The sizes are those of the middle layer of each block of DenseNet-201. Each figure is of many calls captured in one CUDA
graph; bytes are those that an operation cannot avoid, each matrix read or written once.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from densenet_efficient.kernels import CONTRACT, accumulation_dtype, cuda, reference

from . import results as results_file
from .gpu_rows import captured, release_memory, time_step

BATCH = 128
CALLS = 10  # in a graph
BOTTLENECK, GROWTH = 128, 32
WINDOW = 2
# side of the images, channels that the layer reads, channels of the storage
LAYERS = ((56, 160, 256), (28, 320, 512), (14, 1056, 1792), (7, 1408, 1920))
INPUTS = {56: 64, 28: 128, 14: 256, 7: 896}  # channels that a block begins with
STEM = (112, 64, 64)


@dataclass(frozen=True)
class Size:
    """Images of ``side`` x ``side`` pixels, and the channels read, of all that the storage has."""

    images: int
    side: int
    channels: int
    storage: int

    @property
    def rows(self) -> int:
        return self.images * self.side**2


def plan(images: int = BATCH) -> Iterator[tuple[str, Size]]:
    """Every operation of the contract, at the sizes it has in DenseNet-201."""
    for operation in CONTRACT:
        for side, channels, storage in (STEM,) if "max_pool" in operation else LAYERS:
            if "avg_pool" in operation:
                channels = storage  # the exit reads them all
            if operation == "write_with_statistics":
                channels = INPUTS[side]
            yield operation, Size(images, side, channels, storage)


def arguments_of(operation: str, size: Size, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Random arguments by name; the matrices of a storage are slices of one."""
    three, enters = "3x3" in operation, operation == "write_with_statistics"
    inputs = BOTTLENECK if three else GROWTH if operation == "project_gradient" else size.channels
    outputs = GROWTH if three else BOTTLENECK if "1x1" in operation else inputs
    pooled = {"bn_relu_avg_pool": size.side // WINDOW, "bn_relu_max_pool": (size.side - 1) // 2 + 1}
    out_side = pooled.get(operation.removesuffix("_backward"), size.side)
    own = inputs == BOTTLENECK  # the bottleneck's output is a matrix of its own

    def matrix(rows: int, columns: int, within: int) -> Tensor:
        return torch.randn(rows, within, dtype=dtype, device=device)[:, :columns]

    out_rows = size.images * out_side**2

    def images() -> Tensor:
        return matrix(size.rows, inputs, inputs).unflatten(0, (size.images, -1)).transpose(1, 2)

    made: dict[str, Callable[[], Any]] = {
        "x": lambda: images() if enters else matrix(size.rows, inputs, inputs if own else size.storage),
        "grad": lambda: matrix(size.rows, inputs, inputs if own else size.storage),
        "out": lambda: matrix(out_rows, outputs, size.storage if three or enters else outputs),
        "out_grad": lambda: matrix(out_rows, outputs, size.storage if three else outputs),
        "weight": lambda: torch.randn(outputs, inputs, *((3, 3) if three else (1, 1)), device=device) / inputs,
        "affine": lambda: torch.empty(4, inputs, dtype=accumulation_dtype(dtype), device=device),
        "height": lambda: size.side,
        "width": lambda: size.side,
        "window_height": lambda: WINDOW,
        "window_width": lambda: WINDOW,
        "accumulate": lambda: False,
        "count": lambda: size.rows,
        "eps": lambda: 1e-5,
    }
    if operation.startswith("batch_norm"):
        made.pop("weight")
    statistics_of_out = operation in ("bn_relu_conv1x1", "bn_relu_conv3x3")

    def argument(name: str) -> Any:
        if name in made:
            return made[name]()
        if name == "grad_weight" and "conv" in operation:
            return torch.empty_like(made["weight"](), dtype=accumulation_dtype(dtype))
        of_out = name.startswith("out_") or (statistics_of_out and name in ("mean", "variance"))
        return torch.rand(outputs if of_out else inputs, dtype=accumulation_dtype(dtype), device=device)

    return {name: argument(name) for name in inspect.signature(getattr(reference, operation)).parameters}


def bytes_of(operation: str, arguments: dict[str, Any]) -> int:
    """Each matrix and weight once; twice where it is read and written."""
    total = sum(value.numel() * value.element_size() for value in arguments.values() if isinstance(value, Tensor))
    if operation in ("project_gradient", "bn_relu_conv1x1_backward"):
        total += arguments["grad"].numel() * arguments["grad"].element_size()
    return total


def operations_of(operation: str, arguments: dict[str, Any]) -> int:
    """Floating-point operations of the convolution; in a backward twice, for input and weight."""
    if "conv" not in operation:
        return 0
    return 2 * arguments["x"].shape[0] * arguments["weight"].numel() * (2 if operation.endswith("backward") else 1)


def measure(backend: ModuleType, operation: str, size: Size, device: str) -> dict[str, float]:
    arguments = arguments_of(operation, size, torch.bfloat16, device)
    function = getattr(backend, operation)

    def calls() -> None:
        for _ in range(CALLS):
            function(**arguments)

    milliseconds = time_step(captured(calls) if device == "cuda" else calls, seconds=0.05) / CALLS
    return {
        "microseconds": round(milliseconds * 1e3, 2),
        "gigabytes_per_second": _four_digits(bytes_of(operation, arguments) / milliseconds / 1e6),
        "teraflops": _four_digits(operations_of(operation, arguments) / milliseconds / 1e9),
    }


def _four_digits(rate: float) -> float:
    """Rounded to four digits, however slow the device is."""
    return float(f"{rate:.4g}")


def copy_bandwidth(device: str, size: int = 2**30) -> float:
    """Gigabytes read and written per second by a copy."""
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    return round(2 * size / time_step(lambda: target.copy_(source), seconds=0.2) / 1e6, 1)


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_kernels", description=__doc__)
    parser.add_argument("file", type=Path)
    options = parser.parse_args(arguments)
    results = results_file.load(options.file, results_file.describe_machine("cuda"))
    results["copy_gigabytes_per_second"] = copy_bandwidth("cuda")
    results["kernels"] = []
    for backend in (cuda, importlib.import_module("densenet_efficient.kernels.triton")):
        for operation, size in plan():
            if backend is not cuda and operation not in cuda.NATIVE:
                continue  # the backend cuda has the same function
            row = {"operation": operation, "backend": backend.__name__.rpartition(".")[2], **vars(size)}
            results["kernels"].append(row | measure(backend, operation, size, "cuda"))
            print(results["kernels"][-1], flush=True)
            results_file.save(options.file, results)
            release_memory()


if __name__ == "__main__":
    main(sys.argv[1:])
