"""Why some lines of the package run in no test on the machine where `coverage.py` has counted them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from . import markdown

MissedLines = dict[str, dict[str, list[int]]]  # by file and function, "" outside of every function

AMX = "for AMX; tests run it with tiles in AVX-512, uncounted"
EXPRESSION = "a line of an expression that is counted at its other lines"
END = "the end of a function, counted at the lines before it"

# By file, or by "file::function" where the rest of the file runs. Line numbers would go out of date.
REASONS: dict[str, str] = {
    "csrc/cpu/capability.cpp": "asks for AMX's tiles; names what may be asked for, in tests by processes of their own",
    "csrc/cpu/dense_layers_backward.cpp": END,
    "csrc/cpu/gemm.cpp": "multiplies float16 with AMX, and asks whether this CPU does",
    "csrc/cpu/kernels/bn_relu_conv1x1.cpp": EXPRESSION,
    "csrc/cpu/kernels/bn_relu_conv1x1_backward.cpp": EXPRESSION,
    "csrc/cpu/kernels/bn_relu_conv3x3_backward.cpp": EXPRESSION,
    "csrc/cpu/kernels/bn_relu_conv3x3_backward_winograd.cpp": EXPRESSION,
    "csrc/cpu/kernels/bn_relu_conv3x3_winograd.cpp": EXPRESSION,
    "csrc/cpu/kernels/dispatch.h": "a dtype that the checks before every kernel have refused",
    "csrc/cpu/kernels/multiply.cpp": AMX,
    "csrc/cpu/kernels/multiply.h": AMX,
    "csrc/cpu/kernels/multiply_amx.h": AMX,
    "csrc/cpu/kernels/product.h": AMX,
    "csrc/cpu/kernels/registers.h": END,
    "csrc/cpu/kernels/tile.h": "for float16 with AMX",
    "csrc/cpu/memory.cpp": "what allocators offer, and torch calls for no tensor; for a process that may map no more",
    "csrc/cpu/pages.cpp": "for a process that may map no more ranges; ends of functions, counted at the lines before",
    "densenet_efficient/kernels/__init__.py::empty_kept_images": "for a GPU, whose allocator keeps freed memory",
    "densenet_efficient/kernels/cuda.py::architectures": "for an installation without the native extension",
    "densenet_efficient/kernels/triton/launch.py::multiprocessors": "asks a GPU for its number of multiprocessors",
    "densenet_efficient/kernels/triton/launch.py::on_device": "makes another GPU the current one",
    "densenet_efficient/measure.py::_peak_bytes": "begins to count a GPU's memory anew",
    "densenet_efficient/measure.py::_synchronize": "waits for a GPU",
    **{
        f"densenet_efficient/offload.py::{function}": "copies between a GPU and the host"
        for function in ("Lane.__init__", "Lane.to_host", "Lane.to_device", "Lane.wait", "Lane._copy", "lane_of")
    },
    "densenet_efficient/stem.py::_convolve": "convolves all images at once, on a GPU",
    "densenet_efficient/training/batch_size.py::available_memory": "asks a GPU for its free memory",
    "densenet_efficient/training/progress.py::_memory_mib": "asks a GPU for its peak memory",
}


def count(missed: MissedLines) -> int:
    """The number of lines."""
    return sum(len(numbers) for functions in missed.values() for numbers in functions.values())


def unexplained(missed: MissedLines) -> list[str]:
    """The places without a reason, with their lines."""
    return [f"{place}: {', '.join(map(str, numbers))}" for place, numbers, reason in _places(missed) if reason is None]


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Every place with the number of its lines and the reason, folded away."""
    places = [place for row in rows for place in _places(row["missed_lines"])]
    cells = [(f"`{place}`", reason or "", str(len(numbers))) for place, numbers, reason in places]
    summary = "<details><summary>The others, and why no test that counts lines runs them</summary>"
    return [summary, "", *markdown.table(("place", "why", "lines"), cells, words=2), "", "</details>"]


def _places(missed: MissedLines) -> Iterator[tuple[str, list[int], str | None]]:
    for file, functions in missed.items():
        for function, numbers in functions.items():
            place = f"{file}::{function}" if function else file
            yield place, numbers, REASONS.get(place, REASONS.get(file))
