"""A module's tensors by name, around `nn.Module.__getattr__`: a step of a hundred layers asks for a thousand."""

from __future__ import annotations

from typing import Any

from torch import nn


def tensor_of(module: nn.Module, name: str) -> Any:
    """As ``getattr(module, name)``: a parameter, a buffer, or what stands in its place, as of a parametrisation."""
    for held in (module._parameters, module._buffers):
        if name in held:
            return held[name]
    return getattr(module, name)
