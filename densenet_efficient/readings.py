"""What was read of a block's modules, kept for as long as they are made the same way."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from . import fusion, kernels
from .fusion import LayerParts
from .kept import beside

if TYPE_CHECKING:
    from ._C import ModuleSnapshot
    from .operator_calls import StageBlock


class Reading(NamedTuple):
    """What was read of a block, and what it holds for."""

    snapshot: ModuleSnapshot
    holders: list[dict[str, Any]]  # the dictionaries of the convolutions where their weights lie
    shapes: list[tuple[int, ...]]  # of these weights, of which the snapshot knows but the class
    layers: list[LayerParts]

    def holds(self, block: StageBlock) -> bool:
        """Whether all is still the same: a weight may have come in the place of another, with fewer channels."""
        return self.snapshot.matches([block]) and _shapes(self.holders) == self.shapes


def _holder(conv: nn.Module) -> dict[str, Any]:
    """Asked for its weight, a module would take several times as long as its dictionary."""
    return next(held for held in (conv._parameters, conv._buffers, vars(conv)) if "weight" in held)


def _shapes(holders: list[dict[str, Any]]) -> list[tuple[int, ...]]:
    return [held["weight"].shape for held in holders]


def read_once(block: StageBlock) -> list[LayerParts] | str:
    """``block.read()``, anew only where a module, a setting, a hook or a shape of the block is another than it was.

    A hundred layers take longer to read than to run on a small image.
    """
    if torch.compiler.is_compiling() or fusion.any_global_hook() or not kernels.cpu.is_available():
        return block.read()
    from ._C import ModuleSnapshot  # there, because the native backend is

    kept = beside(block)
    reading = kept.reading  # once: another thread may let go of it
    if reading is not None and reading.holds(block):
        return reading.layers
    kept.reading = None
    snapshot = ModuleSnapshot([block], with_values=False)  # first: another thread may change what is being read
    layers = block.read()
    if not isinstance(layers, str):
        convolutions = [conv for layer in layers for conv in layer.convolutions]
        shapes = [fusion.own_shape(conv) for conv in convolutions]
        kept.reading = Reading(snapshot, [_holder(conv) for conv in convolutions], shapes, layers)
    return layers
