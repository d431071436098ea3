"""`python -m benchmarks.roofline`: where the time of a training step goes, and how near each operation is to the roof.

The roof is measured: the rate at which this CPU multiplies matrices that lie in its first caches, and the rate at
which it copies memory. An operation's FLOPs are those of its convolution, padding counted; its bytes
are those of every tensor that it reads or writes, each once, and twice where it adds to what a tensor holds.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from densenet_efficient import kernels, native_layers
from densenet_efficient.measure import make_step
from densenet_efficient.summary import summarize

from . import results as results_file
from .implementations import build

REST = "the rest"  # torch's own operations and Python
ADDED_TO = {  # by operation, the arguments that it always adds to
    "batch_norm_gradients": ("slope", "offset"),
    "bn_relu_conv1x1_backward": ("grad",),
    "project_gradient": ("grad",),
}


@dataclass
class Line:
    """One operation at one size of images, over a step: seconds, FLOPs and bytes of all its calls together."""

    operation: str
    rows: int  # of its largest matrix
    calls: int = 0
    seconds: float = 0.0
    flops: float = 0.0
    bytes: float = 0.0


@dataclass
class Roofline:
    """The lines of one step, the step's own time and FLOPs, and the rates of the machine."""

    model: str
    dtype: str
    batch: int
    size: int
    level: str
    step_seconds: float
    step_flops: float
    product_rate: float  # FLOP/s
    copy_rate: float  # bytes/s, read and written together
    lines: list[Line]


def measure(model: str, dtype: str, batch: int, size: int, level: str, rounds: int) -> Roofline:
    """Medians would hide which operation was slow when; so this is the fastest of ``rounds`` steps, whole."""
    network = build(f"ours-{level}", model)
    step = make_step(network, (3, size, size), batch, dtype=dtype)
    flops = _step_flops(network, size, batch, getattr(torch, dtype))
    step()
    step()
    product, copy = product_rate(getattr(torch, dtype)), copy_rate()
    best_seconds, best_lines = float("inf"), []
    for _ in range(rounds):
        with recorded(kernels.cpu) as lines:
            started = time.perf_counter()
            step()
            seconds = time.perf_counter() - started
        if seconds < best_seconds:
            best_seconds, best_lines = seconds, list(lines.values())
    rest = best_seconds - sum(line.seconds for line in best_lines)
    return Roofline(
        model, dtype, batch, size, level, best_seconds, flops, product, copy,
        [*sorted(best_lines, key=lambda line: -line.seconds), Line(REST, 0, 0, rest)],
    )  # fmt: skip


def product_rate(dtype: torch.dtype, seconds: float = 0.5) -> float:
    """FLOP/s of matrix products in cache, the best of three."""
    return max(torch.ops.densenet_efficient.cpu_product_rate(dtype, seconds) for _ in range(3))


def copy_rate(bytes_of_a_buffer: int = 2**28) -> float:
    """Bytes/s read and written while one large buffer is copied into another, the best of five."""
    source, target = torch.ones(bytes_of_a_buffer, dtype=torch.uint8), torch.ones(bytes_of_a_buffer, dtype=torch.uint8)
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        target.copy_(source)
        best = min(best, time.perf_counter() - started)
    return 2 * bytes_of_a_buffer / best


@contextlib.contextmanager
def recorded(backend: ModuleType) -> Iterator[dict[tuple[str, int], Line]]:
    """Times every operation that runs on ``backend`` meanwhile; lines by (operation, rows).

    The native loop over the layers hides its operations, so Python's runs in its place; its time is in the rest.
    """
    lines: dict[tuple[str, int], Line] = {}
    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.object(native_layers, "can_run", return_value=False))
        for name in kernels.CONTRACT:
            patches.enter_context(mock.patch.object(backend, name, _timed(name, getattr(backend, name), lines)))
        yield lines


def _timed(name: str, operation: Callable[..., None], lines: dict[tuple[str, int], Line]) -> Callable[..., None]:
    parameters = list(inspect.signature(getattr(kernels.reference, name)).parameters)

    def run(*arguments: Any) -> None:
        started = time.perf_counter()
        operation(*arguments)
        seconds = time.perf_counter() - started
        tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
        rows = 0 if name.startswith("batch_norm") else max(t.shape[0] for t in tensors if t.dim() == 2)
        line = lines.setdefault((name, rows), Line(name, rows))
        line.calls += 1
        line.seconds += seconds
        line.bytes += sum(map(_bytes, [*tensors, *_added_to(name, dict(zip(parameters, arguments, strict=True)))]))
        line.flops += _convolution_flops(name, rows, tensors)

    return run


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _added_to(name: str, arguments: dict[str, Any]) -> list[Tensor]:
    """What an operation both reads and writes; those that may add or assign say which by ``accumulate``."""
    names = ("grad",) if arguments.get("accumulate") else ADDED_TO.get(name, ())
    return [arguments[name] for name in names if arguments[name] is not None]


def _convolution_flops(name: str, rows: int, tensors: Sequence[Tensor]) -> float:
    weights = [tensor for tensor in tensors if tensor.dim() == 4]
    if not weights:
        return 0.0
    # Backward: the gradient of the input (there if there are sums) and of the weight (there if it is given beside it).
    products = 1 if not name.endswith("_backward") else len(weights[1:]) + _has_input_gradient(tensors, weights[0])
    return 2.0 * rows * weights[0].numel() * products


def _has_input_gradient(tensors: Sequence[Tensor], weight: Tensor) -> int:
    """After the weight only sums are vectors, and they are given where the input's gradient is wanted."""
    index = next(index for index, tensor in enumerate(tensors) if tensor is weight)
    return int(any(tensor.dim() == 1 for tensor in tensors[index + 1 :]))


def _step_flops(network: nn.Module, size: int, batch: int, dtype: torch.dtype) -> float:
    """Of all convolutions and the classifier, forward and backward; transitions after their pooling.

    The images need no gradient, so the stem's backward is one product.
    """
    rows = [row for row in summarize(network, (batch, 3, size, size), dtype) if not row.is_layer]
    pooled = {row.name: 4 if row.name.startswith("transition") else 1 for row in rows}
    forward = [2.0 * row.costs.multiply_adds / pooled[row.name] for row in rows]
    return 3 * sum(forward) - forward[0]


def title(roofline: Roofline) -> str:
    """The workload, its time and its share of the roof."""
    share = roofline.step_flops / roofline.step_seconds / roofline.product_rate
    return (
        f"{roofline.model}, {roofline.dtype}, batch {roofline.batch}, {roofline.size}x{roofline.size}, "
        f"{roofline.level}: {roofline.step_seconds * 1e3:.0f} ms, {share:.0%} of the roof"
    )


def as_table(roofline: Roofline) -> Table:
    """For the terminal."""
    table = Table(title=title(roofline))
    for column in COLUMNS:
        table.add_column(column, justify="left" if column == "operation" else "right")
    for cells in table_cells(roofline):
        table.add_row(*cells)
    return table


COLUMNS = ("operation", "rows", "calls", "ms", "of the step", "GFLOP/s", "of the roof", "GB/s", "of the copy rate")


def table_cells(roofline: Roofline) -> list[list[str]]:
    """One list of cells per line, in the order of `COLUMNS`."""
    return [_cells(line, roofline) for line in roofline.lines]


def _cells(line: Line, roofline: Roofline) -> list[str]:
    cells = [line.operation, str(line.rows or ""), str(line.calls or "")]
    cells += [f"{line.seconds * 1e3:.1f}", f"{line.seconds / roofline.step_seconds:.1%}"]
    for amount, rate in ((line.flops, roofline.product_rate), (line.bytes, roofline.copy_rate)):
        reached = amount / line.seconds if line.seconds > 0 else 0.0
        cells += [f"{reached / 1e9:.0f}", f"{reached / rate:.0%}"] if amount else ["", ""]
    return cells


def without_small_lines(roofline: Roofline, least: float = 0.01) -> Roofline:
    """The same, all lines below this share of the step in one."""
    small = Line("operations below 1 % each", 0)
    kept = []
    for line in roofline.lines:
        if line.operation == REST or line.seconds >= least * roofline.step_seconds:
            kept.append(line)
        else:
            small.calls += line.calls
            small.seconds += line.seconds
    return replace(roofline, lines=[*kept[:-1], small, kept[-1]])


def merged_by_operation(roofline: Roofline) -> Roofline:
    """The same with the sizes of one operation in one line."""
    totals: dict[str, Line] = {}
    for line in roofline.lines:
        total = totals.setdefault(line.operation, Line(line.operation, 0))
        for field in ("calls", "seconds", "flops", "bytes"):
            setattr(total, field, getattr(total, field) + getattr(line, field))
    lines = sorted(totals.values(), key=lambda line: (line.operation == REST, -line.seconds))
    return replace(roofline, lines=lines)


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.roofline", description=__doc__)
    parser.add_argument("--models", nargs="+", default=["densenet121", "densenet201"])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--levels", nargs="+", default=["none"], choices=("none", "bottleneck"))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=224, help="height and width of the images")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--save", action="store_true", help="into benchmarks/results/<machine>-roofline.json")
    options = parser.parse_args(arguments)
    if kernels.backend_name("cpu") != "cpu":
        sys.exit("the roofline is that of the native CPU backend; unset DENSENET_EFFICIENT_BACKEND")
    console, found = Console(), []
    for model in options.models:
        for dtype in options.dtypes:
            for level in options.levels:
                found.append(measure(model, dtype, options.batch, options.size, level, options.rounds))
                console.print(as_table(merged_by_operation(found[-1])), as_table(found[-1]))
    if options.save:
        path = save(found)
        console.print(f"wrote {path}")


def save(rooflines: Sequence[Roofline]) -> Path:
    """Into the machine's own file beside its results."""
    header = results_file.describe_machine()
    path = results_file.RESULTS / f"{header['machine']}-roofline.json"
    results_file.save(path, {"header": header, "rows": [asdict(roofline) for roofline in rooflines]})
    return path


if __name__ == "__main__":
    main(sys.argv[1:])
