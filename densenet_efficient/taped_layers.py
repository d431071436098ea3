"""The loop of `dense_layers` on a GPU, recorded once per layout and then launched from C++: to the same bits."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import dense_layers, kernels
from .batch_norm import Projection
from .kernels import spatial
from .layout import as_rows
from .stage import Stage, StageOutput

MOST_TAPES = 256  # kept at a time, the oldest is dropped: of networks of four blocks, 32 layouts of a training

Results = Sequence[Tensor | None]


class Tape(NamedTuple):
    """What repeats a loop."""

    native: Any  # a LaunchTape; None where the loop cannot be recorded
    compiled: list[Any]  # Triton's kernels, which go with it
    is_result: list[bool]  # for each result, whether there is one


_tapes: OrderedDict[Hashable, Tape | None] = OrderedDict()  # None where a layout was met once
_lock = threading.Lock()


def can_run(stage: Stage, backend: ModuleType, x: Tensor) -> bool:
    """Whether the loop over the layers of ``stage`` can be recorded, for activations like ``x``.

    In float32 and float64 weights are packed by torch for each layer, where the card takes longer than Python.
    """
    return (
        x.device.type == "cuda"
        and x.dtype.itemsize == 2
        and backend is not kernels.reference
        and kernels.cuda.architectures() is not None
        and stage.has_kernels_alone
    )


def forward_layers(
    stage: Stage,
    backend: ModuleType,
    storage: Tensor,
    size: spatial.Size,
    statistics: Tensor,
    bottleneck_statistics: Tensor,
    saved_bottlenecks: int,
) -> list[Tensor]:
    """As `dense_layers.forward_layers`."""

    def loop() -> Results:
        triton = kernels.backend_named("triton")
        return dense_layers.forward_layers(
            stage, triton, storage, size, statistics, bottleneck_statistics, saved_bottlenecks
        )

    key = ("forward", size, stage.needs_statistics, saved_bottlenecks)
    bottlenecks = _run(key, loop, stage, [storage, statistics, bottleneck_statistics])
    return [bottleneck for bottleneck in bottlenecks if bottleneck is not None]


def backward_layers(
    stage: Stage,
    saved: StageOutput,
    grad: Tensor,
    projection: Projection,
    input_needed: bool,
    layers_needed: list[list[bool]],
) -> list[list[Tensor | None]]:
    """As `dense_layers.backward_layers`."""
    projection.backend = kernels.backend_named("triton")

    def loop() -> Results:
        gradients = dense_layers.backward_layers(stage, saved, grad, projection, input_needed, layers_needed)
        return [gradient for layer in gradients for gradient in layer]

    buffers = [grad, as_rows(saved.features), saved.statistics, saved.bottleneck_statistics]
    key = (
        "backward", saved.features.shape[2:], projection.is_empty, input_needed, dense_layers.MOST_PARTS,
        *map(tuple, layers_needed),
    )  # fmt: skip
    gradients = iter(_run(key, loop, stage, [*buffers, projection.slope, *saved.bottlenecks]))
    return [[next(gradients) for _ in needed] for needed in layers_needed]


def _run(key: tuple[Hashable, ...], loop: Callable[[], Results], stage: Stage, buffers: Sequence[Tensor]) -> Results:
    """Runs a loop at the first sight of a layout, records it at the second, and repeats it from then on.

    While a CUDA graph is captured nothing is recorded, which may load kernels, and nothing dropped: CUDA graphs that go
    would spoil it.
    """
    from ._C import layout_of

    vectors, epsilons, runs = _flatten(stage)
    key = (*key, epsilons, runs, layout_of([*buffers, *vectors]))
    is_captured = buffers[0].is_cuda and torch.cuda.is_current_stream_capturing()
    with _lock:
        is_known = key in _tapes
        tape = _tapes.setdefault(key, None)
        _tapes.move_to_end(key)
        while len(_tapes) > MOST_TAPES and not is_captured:
            _tapes.popitem(last=False)
    if tape is None:
        return _record(key, loop, buffers, vectors) if is_known and not is_captured else loop()
    if tape.native is None:
        return loop()
    results = tape.native.repeat([*buffers, *vectors])
    if results is None:
        return loop()
    made = iter(results)
    return [next(made) if is_result else None for is_result in tape.is_result]


def _record(
    key: Hashable, loop: Callable[[], Results], buffers: Sequence[Tensor], vectors: Sequence[Tensor]
) -> Results:
    from .launch_recording import Recording

    with Recording(buffers, vectors) as recording:
        results = loop()
    native = recording.tape([result for result in results if result is not None])
    with _lock:
        _tapes[key] = Tape(native, recording.kernels(), [result is not None for result in results])
    return results


def _flatten(stage: Stage) -> tuple[list[Tensor], tuple[float, ...], tuple[bool, ...]]:
    """The parameters and running statistics of the layers; the norms' epsilons; which of them have the latter."""
    norms = stage.norms
    vectors = [vector for norm in norms for vector in (norm.weight, norm.bias, *(norm.running or ()))]
    runs = tuple(norm.running is not None for norm in norms)
    return [*vectors, *stage.convolutions], tuple(norm.eps for norm in norms), runs
