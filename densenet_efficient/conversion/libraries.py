"""The DenseNets of other libraries, recognised by the names of their classes: none of them needs to be installed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import cast

from torch import nn

from .. import fusion
from ..fusion import LayerParts

DROPOUTS = (nn.Dropout, nn.Dropout2d, nn.Dropout3d)  # MONAI's of one, two and three dimensions
IN_ORDER = ["norm1", "relu1", "conv1", "norm2", "relu2", "conv2"]


@dataclass(frozen=True)
class Library:
    """Where a library defines its DenseNet, and how one of its dense layers is read."""

    name: str
    module: str
    block: str
    layer: str
    layer_parts: Callable[[nn.Module], LayerParts | str]

    def read_layer(self, layer: nn.Module) -> LayerParts | str:
        """The parts of a layer, or what is in the way."""
        if not fusion.is_class(layer, self.module, self.layer):
            return f" is a {type(layer).__name__}, not {self.name}'s {self.layer}"
        if fusion.is_observed(layer):
            return " has a hook"
        return self.layer_parts(layer)


def base_class(kind: type, module: str, name: str) -> type | None:
    """The class of this name among ``kind`` and its bases."""
    return next((base for base in kind.__mro__ if (base.__module__, base.__name__) == (module, name)), None)


def _by_name(layer: nn.Module) -> LayerParts | str:
    """A layer whose forward calls its modules by name: torchvision's and timm's."""
    return fusion.read_layer(layer._modules, cast(float, layer.drop_rate), layer.training)


def _in_order(layer: nn.Module) -> LayerParts | str:
    """A layer that is a sequence, with functional dropout: torchxrayvision's."""
    if list(layer._modules) != IN_ORDER:
        return " has other submodules than its norms, ReLUs and convolutions, or in another order"
    return _by_name(layer)


def _in_layers(layer: nn.Module) -> LayerParts | str:
    """A layer that holds its sequence, with a dropout module at the end: MONAI's."""
    layers = cast(nn.Module, layer.layers)
    if type(layers) is not nn.Sequential or fusion.is_observed(layers):
        return ".layers is replaced or observed"
    modules: Mapping[str, nn.Module | None] = layers._modules
    dropout = modules.get("dropout")
    if list(modules) != IN_ORDER + ["dropout"] * (dropout is not None):
        return ".layers has other modules than norms, ReLUs, convolutions and dropout, or in another order"
    if dropout is None:
        return fusion.read_layer(modules, 0.0, layer.training)
    if type(dropout) not in DROPOUTS or fusion.is_observed(dropout):
        return ".layers.dropout is replaced or observed"
    parts = fusion.read_layer(modules, cast(nn.Dropout, dropout).p, dropout.training)
    if not isinstance(parts, str):
        parts.drops_channels = type(dropout) is not nn.Dropout
    return parts


LIBRARIES = (
    Library("torchvision", "torchvision.models.densenet", "_DenseBlock", "_DenseLayer", _by_name),
    Library("timm", "timm.models.densenet", "DenseBlock", "DenseLayer", _by_name),
    Library("MONAI", "monai.networks.nets.densenet", "_DenseBlock", "_DenseLayer", _in_layers),
    Library("torchxrayvision", "torchxrayvision.models", "_DenseBlock", "_DenseLayer", _in_order),
)


def library_of_block(kind: type) -> Library | None:
    """The library whose dense block ``kind`` is, or is a subclass of."""
    return next((library for library in LIBRARIES if base_class(kind, library.module, library.block)), None)
