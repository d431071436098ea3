"""What was read of a block's modules, kept for as long as they are made the same way."""

from __future__ import annotations

from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch

from . import fusion, kernels
from .fusion import LayerParts

if TYPE_CHECKING:
    from ._C import ModuleSnapshot
    from .operator_calls import StageBlock

_readings: WeakKeyDictionary[StageBlock, tuple[ModuleSnapshot, list[LayerParts]]] = WeakKeyDictionary()


def read_once(block: StageBlock) -> list[LayerParts] | str:
    """``block.read()``, anew only where a module, a setting or a hook of the block is another than it was.

    A hundred layers take longer to read than to run on a small image.
    """
    if torch.compiler.is_compiling() or fusion.any_global_hook() or not kernels.cpu.is_available():
        return block.read()
    from ._C import ModuleSnapshot  # there, because the native backend is

    kept = _readings.get(block)
    if kept is not None and kept[0].matches([block]):
        return kept[1]
    layers = block.read()
    if not isinstance(layers, str):
        _readings[block] = ModuleSnapshot([block], with_values=False), layers
    return layers
