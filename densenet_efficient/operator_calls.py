"""From modules to operators: what runs as one operator is checked, called, and its running statistics updated.

`StageBlock` is a dense block that runs so where nothing is in the way.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from . import fusion, inference, operators
from .argument_checks import check_level
from .dimensions import BatchNorm, Convolution, dims_of
from .fusion import NO_CONSUMER, LayerParts, StageExit
from .input_checks import (
    as_compute_dtype,
    check_count,
    check_devices,
    check_images,
    check_input,
    check_poolable,
    compute_dtype,
    convolved_size,
    pixels,
)
from .kept import ATTRIBUTE
from .offload import offloaded
from .readings import read_once
from .running_statistics import Update, is_due, moments, update_running_statistics, updates_of
from .stage import TRANSITION_DOWN
from .stage_arguments import (
    draw_masks,
    norms_of,
    parameters_of,
    parameters_of_exit,
    running_of,
    stage_updates,
)
from .synchronisation import exchange_counts, group_of_all

BLOCK_ATTRIBUTES = ("_checkpointing", "offload", "free_bottlenecks", ATTRIBUTE)  # that a `StageBlock` may hold


class StageBlock(nn.Module):
    """A dense block that runs as one operator; through its modules, and saying so once, where that is impossible."""

    offload: bool = False  # whether a GPU's storage waits for the backward in the host's memory
    # Of how many layers, the last ones, "bottleneck" saves the bottlenecks too, by type of device: those that do not
    # make the peak of a step of the whole network.
    free_bottlenecks: Mapping[str, int] = MappingProxyType({})

    @property
    def checkpointing(self) -> str:
        """The level: "none" or "bottleneck"; assign either at any time."""
        return self._checkpointing

    @checkpointing.setter
    def checkpointing(self, level: str) -> None:
        check_level(level)
        self._checkpointing = level

    def saved_bottlenecks(self, reached: int, device: str, is_within_network: bool) -> int:
        """Of how many of its layers, the last ones, a forward keeps the bottlenecks for a backward.

        It runs through ``reached`` of them.
        """
        if self.checkpointing == "none":
            return reached
        # A user may have taken layers away since these were counted.
        return min(self.free_bottlenecks.get(device, 0), reached) if is_within_network else 0

    def read(self) -> list[LayerParts] | str:
        """The layers as the operator takes them, or what is in the way."""
        raise NotImplementedError

    def forward_by_layers(self, x: Tensor) -> Tensor:
        """The same through the modules' own ``forward``: hooks run, nothing is fused."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        layers = fusion.tracer(x, self.training) or read_once(self)
        if not isinstance(layers, str):
            return run_stage(self, layers, NO_CONSUMER, x)[1]
        _announce(self, layers)
        return self.forward_by_layers(x)


def run_stage(
    block: StageBlock,
    layers: list[LayerParts],
    stage_exit: StageExit,
    x: Tensor,
    keep_features: bool = True,
    is_within_network: bool = False,
    later: list[Update] | None = None,
) -> tuple[Tensor, Tensor]:
    """Runs a dense block, whose layers were read, and what consumes it within its stage.

    Returns the consumer's output (empty without one) and the block's features [N, C, H, W], which an inference leaves
    empty where they need not be kept, and updates the running statistics of every norm, once; where ``later`` is given
    the updates join it, for a caller who makes them when its whole network has been computed. ``is_within_network``:
    the backward goes on through all stages before this one, and then the step is at an end.
    """
    if inference.applies(x):
        kept = inference.kept_stage(block, stage_exit.consumer)
        prepared = kept or inference.prepare_stage(block, layers, stage_exit, x)
        if prepared is not None:
            return run_prepared(prepared, x, keep_features)
    elif torch.is_grad_enabled():
        inference.forget_stage(block)
    check_input(layers[0].norm1, layers[0].spatial_dims, x)
    norms, exit_parameters = norms_of(layers, stage_exit), parameters_of_exit(stage_exit)
    parameters = [parameter for layer in layers for parameter in parameters_of(layer)]
    uses_running = [not fusion.uses_batch_statistics(norm) for norm in norms]
    running = [one for norm, uses in zip(norms, uses_running, strict=True) if uses for one in running_of(norm)]
    check_devices(x, (*parameters, *exit_parameters, *running))
    group, counts, total = _count_values(norms, pixels(x), x)
    check_poolable(stage_exit, x)
    x = as_compute_dtype(x, [*parameters[2::3], *exit_parameters[2:]])  # the convolutions' weights
    drop_rate, masks = draw_masks(layers, stage_exit.conv if stage_exit.kind == TRANSITION_DOWN else None, x)
    with offloaded(block.offload, x, [*parameters, *exit_parameters]):
        out, features, statistics, bottleneck_statistics, _ = operators.dense_stage(
            x,
            parameters,
            exit_parameters,
            running,
            masks,
            [norm.eps for norm in norms],
            uses_running,
            layers[0].bottleneck,
            [layer.dilation for layer in layers],
            stage_exit.kind,
            drop_rate,
            block.saved_bottlenecks(_reached_layers(len(layers), parameters, x), x.device.type, is_within_network),
            counts,
            group,
        )
    updates = stage_updates(layers, stage_exit.norm, statistics, bottleneck_statistics, total)
    if later is None:
        update_running_statistics(updates)
    else:
        later += updates
    return out, features


def _count_values(norms: list[BatchNorm], count: int, x: Tensor) -> tuple[str, Tensor | None, int | Tensor]:
    """The group in which ``norms`` take their statistics, the values per channel of each of its processes, and of all.

    Those of this process are ``count``, made from ``x``; by itself it has no group.
    """
    group = group_of_all(norms)
    counts = exchange_counts(count, group, x)
    if counts is None:
        check_count(norms, count, x)
        return group, None, count
    return group, counts, counts.sum()


def _reached_layers(layers: int, parameters: list[Tensor], x: Tensor) -> int:
    """Through how many layers, the last ones, the backward of a forward of ``x`` runs."""
    if not torch.is_grad_enabled():
        return 0
    if x.requires_grad:
        return layers
    frozen = next((index for index, parameter in enumerate(parameters) if parameter.requires_grad), len(parameters))
    return layers - frozen * layers // len(parameters)


def run_prepared(prepared: inference.PreparedStage, x: Tensor, keep_features: bool) -> tuple[Tensor, Tensor]:
    """The outputs of `run_stage` for a stage that an inference has prepared."""
    check_input(prepared.norms[0], dims_of(prepared.convolutions[0]), x)
    check_poolable(prepared.exit, x)
    check_devices(x, prepared.weights)
    return prepared.run(as_compute_dtype(x, prepared.weights), keep_features)


def run_stem(conv: Convolution, norm: BatchNorm, x: Tensor, save_conv: bool, later: list[Update]) -> Tensor:
    """Runs (conv, norm, relu, max pool) as one operator; the norm's update of its statistics joins ``later``."""
    check_images(conv, x)
    running = [] if fusion.uses_batch_statistics(norm) else running_of(norm)
    check_devices(x, (conv.weight, norm.weight, norm.bias, *running))
    dtype = compute_dtype(x, [conv.weight])
    is_inference = inference.applies(x)
    # A weight of another class, a quantised one perhaps, may know PyTorch's own operations alone.
    is_plain = type(conv.weight) in (nn.Parameter, Tensor)
    if is_inference and is_plain and running and x.shape[0] > 0 and dims_of(conv) == 2:
        return inference.run_stem(conv, norm, x, dtype)
    x = x.to(dtype)
    group, counts, total = _count_values([norm], x.shape[0] * math.prod(convolved_size(conv, x)), x)
    # An operator's first call imports the compiler, which takes as long as torch itself; nothing sees an inference's.
    run: Callable[..., Any] = operators.compute_stem if is_inference else operators.stem
    has_backward = torch.is_grad_enabled() and any(
        tensor.requires_grad for tensor in (x, conv.weight, norm.weight, norm.bias)
    )
    out, statistics, _ = run(
        x, conv.weight, norm.weight, norm.bias, running, list(conv.stride), list(conv.padding), norm.eps,
        save_conv and has_backward, counts, group,
    )  # fmt: skip
    if is_due(norm):
        later += updates_of([norm], [moments(statistics, total)], total)
    return out


_announced: WeakSet[nn.Module] = WeakSet()
_announces: ContextVar[bool] = ContextVar("announces", default=True)


@contextmanager
def unannounced() -> Iterator[None]:
    """Within it a block that runs layer by layer does not say so; it does when it runs so again."""
    token = _announces.set(False)
    try:
        yield
    finally:
        _announces.reset(token)


def _announce(block: nn.Module, reason: str) -> None:
    if torch.compiler.is_compiling():  # first: a compiler must not see the rest
        return
    if _announces.get() and block not in _announced:
        _announced.add(block)
        warnings.warn(f"a dense block runs layer by layer, with more memory and time: {reason}", stacklevel=3)
