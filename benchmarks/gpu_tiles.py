"""`python -m benchmarks.gpu_tiles FILE`: the tiles of the convolutions' Triton kernels, timed at DenseNet-201's sizes.

What `_tile` in each kernel's file returns was chosen from such a file. Beside them stand the bare products of cuDNN and
cuBLAS, without batch norm, ReLU, sums and statistics. Calls wait behind a kernel that sleeps, so that the time is the
card's and not that of launching them.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import itertools
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from densenet_efficient.kernels.triton.launch import Tile

from . import results as results_file
from .gpu_kernels import BATCH, BOTTLENECK, GROWTH, LAYERS, Size, arguments_of, copy_bandwidth

TRITON = "densenet_efficient.kernels.triton"
CALLS = 3
SLEEP = 3_000_000  # cycles, longer than launching the calls takes
NOT_THE_INPUT = {"grad": None, "sum_grad": None, "sum_grad_x": None}
NOT_THE_WEIGHT = {"grad_weight": None}


@dataclass(frozen=True)
class Kernel:
    """A kernel's file, its operation, the results that others compute, and what its `_tile` may return."""

    file: str
    operation: str
    without: dict[str, None]
    candidates: Sequence[Any]


def _tiles(shapes: Sequence[tuple[int, int, int, int]], stages: Sequence[int]) -> list[Tile]:
    """Of all shapes, (rows, columns, depth, warps), with every number of stages."""
    return [Tile(*shape, stage) for shape, stage in itertools.product(shapes, stages)]


KERNELS = (
    Kernel(
        "bn_relu_conv3x3_backward_input", "bn_relu_conv3x3_backward", NOT_THE_WEIGHT,
        _tiles([(64, 128, 32, 4), (64, 64, 32, 4), (128, 128, 32, 8), (128, 64, 32, 8)], [2, 3, 4, 5]),
    ),
    Kernel(
        "bn_relu_conv3x3", "bn_relu_conv3x3", {},
        _tiles([(128, 32, 64, 4), (64, 32, 64, 4), (64, 32, 128, 4), (128, 32, 64, 8), (64, 32, 64, 8)], [1, 2, 3]),
    ),
    Kernel(
        "bn_relu_conv1x1_backward_joint", "bn_relu_conv1x1_backward", {},
        _tiles([(32, 64, 128, 4), (64, 64, 128, 8), (32, 128, 128, 8), (32, 64, 128, 8)], [1]),
    ),
    Kernel(
        "bn_relu_conv1x1", "bn_relu_conv1x1", {},
        _tiles([(128, 128, 64, 8), (128, 128, 32, 8), (64, 128, 64, 4), (64, 128, 32, 4)], [1, 2, 3, 4]),
    ),
    Kernel(
        "bn_relu_conv3x3_backward_weight", "bn_relu_conv3x3_backward", NOT_THE_INPUT,
        [
            (tile, taps)
            for tile in _tiles([(64, 32, 64, 4), (64, 32, 128, 4), (128, 32, 64, 8), (64, 32, 64, 8)], [2, 3])
            for taps in (3, 9)
        ],
    ),
)  # fmt: skip


def sizes() -> list[Size]:
    return [Size(BATCH, side, channels, storage) for side, channels, storage in LAYERS]


@contextlib.contextmanager
def tile_of(file: str, candidate: Any) -> Iterator[None]:
    """Within, the kernel of ``file`` takes this tile; its own where None."""
    module: Any = importlib.import_module(f"{TRITON}.{file}")
    own = module._tile
    if candidate is not None:
        module._tile = lambda *_: candidate
    try:
        yield
    finally:
        module._tile = own


def microseconds(call: Callable[[], object]) -> float:
    """The median time of a call on the card."""
    call()
    torch.cuda.synchronize()
    torch.cuda._sleep(SLEEP)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(CALLS + 1)]
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(events)) * 1e3


def measure(kernel: Kernel, size: Size, device: str) -> Iterator[dict[str, Any]]:
    """A row for the kernel's own tile, given as None, and for each candidate; without a time where it fails."""
    operation = getattr(importlib.import_module(TRITON), kernel.operation)
    arguments = arguments_of(kernel.operation, size, torch.bfloat16, device) | kernel.without
    for candidate in (None, *kernel.candidates):
        row = {"kernel": kernel.file, **vars(size), "tile": candidate}
        with tile_of(kernel.file, candidate):
            try:
                row["microseconds"] = round(microseconds(lambda: operation(**arguments)), 1)
            except Exception as error:  # too much of the card's shared memory, say
                row |= {"microseconds": None, "reason": f"{type(error).__name__}: {error}".splitlines()[0]}
        yield row


def products(size: Size, device: str) -> dict[str, Callable[[], object]]:
    """The convolutions of a layer by cuDNN and cuBLAS, on tensors of their own."""

    def images(channels: int) -> Tensor:
        made = torch.randn(size.images, channels, size.side, size.side, device=device, dtype=torch.bfloat16)
        return made.to(memory_format=torch.channels_last)

    z, y = images(BOTTLENECK), images(GROWTH)
    weight = torch.randn(GROWTH, BOTTLENECK, 3, 3, device=device, dtype=torch.bfloat16)
    weight = weight.to(memory_format=torch.channels_last)
    x = torch.randn(size.rows, size.storage, device=device, dtype=torch.bfloat16)[:, : size.channels]
    out = torch.randn(size.rows, BOTTLENECK, device=device, dtype=torch.bfloat16)
    matrix = torch.randn(BOTTLENECK, size.channels, device=device, dtype=torch.bfloat16)

    def backward(*needed: bool) -> object:
        geometry: tuple[Any, ...] = ([1, 1], [1, 1], [1, 1], False, [0, 0], 1)
        return torch.ops.aten.convolution_backward(y, z, weight, None, *geometry, [*needed, False])

    return {
        "conv3x3": lambda: F.conv2d(z, weight, padding=1),
        "conv3x3 backward, input": lambda: backward(True, False),
        "conv3x3 backward, weight": lambda: backward(False, True),
        "conv1x1": lambda: x @ matrix.t(),
        "conv1x1 backward, input": lambda: out @ matrix,
        "conv1x1 backward, weight": lambda: out.t() @ x,
    }


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_tiles", description=__doc__)
    parser.add_argument("file", type=Path)
    options = parser.parse_args(arguments)
    torch.backends.cudnn.benchmark = True
    results = results_file.describe_machine("cuda")
    results = results_file.load(options.file, results) | {"copy_gigabytes_per_second": copy_bandwidth("cuda")}
    results |= {"rows": [], "products": []}
    for size in sizes():
        for name, call in products(size, "cuda").items():
            results["products"].append({"product": name, **vars(size), "microseconds": round(microseconds(call), 1)})
    for kernel, size in itertools.product(KERNELS, sizes()):
        for row in measure(kernel, size, "cuda"):
            results["rows"].append(row)
            print(row, flush=True)
        results_file.save(options.file, results)


if __name__ == "__main__":
    main(sys.argv[1:])
