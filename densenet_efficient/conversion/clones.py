"""Dense blocks written by hand after torchvision's, in any dimensions: 3D-ResNets', Pleiss's, a user's own.

They are known by the names of their children (denselayer1, ...; norm1, conv1, ...), and believed only on trial: a copy
of the block with random weights must give, in training and in evaluation, what a dense block of its parts gives.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Hashable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import fusion
from ..dimensions import BatchNorm
from ..fusion import LayerParts
from ..operator_calls import BLOCK_ATTRIBUTES

LENGTH = 5  # of the trial's images along each axis
TOLERANCE = 1e-9

# What a module has besides what its forward may look at.
BOOKKEEPING = {*vars(nn.Module()), *BLOCK_ATTRIBUTES}
PART = re.compile(r"(norm|relu|conv)[12]|denselayer\d+")  # by these names fusion reads a layer, and a block its layers

# The classes of blocks and of their layers that were tried in this process, and what these were besides.
_believed: set[Hashable] = set()


def is_clone(block: nn.Module) -> bool:
    """Whether ``block`` has dense layers by torchvision's names, and nothing else."""
    names = list(block._modules)
    return bool(names) and all(re.fullmatch(r"denselayer\d+", name) for name in names)


def read_clone(block: nn.Module, original: type[nn.Module], try_anew: bool = False) -> list[LayerParts] | str:
    """The layers of ``block``, or what is in the way.

    Args:
        original: the class of ``block``, or what it was before it was converted.
        try_anew: without it, what was tried once in this process is believed of all blocks of the same classes with
            the same attributes and further submodules.
    """
    if "forward" in vars(block):
        return "its forward is set on the instance"
    layers = fusion.read_block(block, _read_layer)
    if isinstance(layers, str):
        return layers
    classes: set[Hashable] = {(original, type(layer)) for layer in block._modules.values()}
    # A compiler, which cannot trace it, asks for no more than the classes.
    looked_at = classes if torch.compiler.is_compiling() else _states(block, original)
    if try_anew or not looked_at <= _believed:
        reason = _try(block, original)
        if reason is not None:
            return reason
        _believed.update(classes, looked_at)
    return layers


def _states(block: nn.Module, original: type[nn.Module]) -> set[Hashable]:
    """What the forwards of the block and of its layers may depend on besides the parts that are read of them."""
    own = _state(block)
    return {(original, own, type(layer), _state(layer)) for layer in block.children()}


def _state(module: nn.Module) -> tuple[Hashable, ...]:
    """The attributes of ``module``, and of its other submodules their names, classes and states."""
    attributes = {name: repr(value) for name, value in vars(module).items() if name not in BOOKKEEPING}
    if "drop_rate" in attributes:  # which is read
        attributes["drop_rate"] = str(bool(module.drop_rate))
    others = [(name, type(other), _state(other)) for name, other in _others(module)]
    return *sorted(attributes.items()), *others


def _others(module: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, other) for name, other in module.named_children() if not PART.fullmatch(name)]


def _read_layer(layer: nn.Module) -> LayerParts | str:
    others = [module for _, other in _others(layer) for module in other.modules()]
    if any(map(fusion.is_observed, [layer, *others])):
        return " has a hook"
    drop_rate = getattr(layer, "drop_rate", 0.0)
    if not isinstance(drop_rate, int | float):
        return f" has a {type(drop_rate).__name__} as its drop_rate"
    return fusion.read_layer(layer._modules, float(drop_rate), layer.training)


def _try(block: nn.Module, original: type[nn.Module]) -> str | None:
    """Why ``block`` is no dense block of its parts; None where it is one."""
    if any(tensor.is_meta for tensor in (*block.parameters(), *block.buffers())):
        return "on the meta device its forward cannot be tried"
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False), torch.random.fork_rng(devices=[]):
            if not _is_dense_block(copy.deepcopy(block).cpu().double(), original):
                return "its forward, tried on random numbers, is not that of a dense block of its parts"
    except Exception as error:
        return f"its forward, tried on random numbers, raises {type(error).__name__}: {error}".splitlines()[0]
    return None


def _is_dense_block(tried: nn.Module, original: type[nn.Module]) -> bool:
    """Whether the forward of this copy, which is changed, gives the same as its parts."""
    _randomise(tried)
    for training in (True, False):
        tried.train(training)
        layers = cast(list[LayerParts], fusion.read_block(tried, _read_layer))
        size = [LENGTH] * layers[0].spatial_dims
        images = torch.randn(2, layers[0].norm1.num_features, *size, dtype=torch.float64, device="cpu")
        seed = torch.default_generator.manual_seed  # of the dropout; torch.manual_seed would seed GPUs too
        seed(0)
        expected = _dense_block(layers, images)
        seed(0)
        if not _are_equal(original.forward(tried, images.clone()), expected):
            return False
    return True


def _randomise(block: nn.Module) -> None:
    """Whatever the weights are, those of the trial show every part of the block."""
    for tensor in (*block.parameters(), *block.buffers()):
        if tensor.dim() > 1:
            nn.init.kaiming_normal_(tensor)
        elif tensor.is_floating_point():
            tensor.uniform_(0.5, 1.5)


def _dense_block(layers: list[LayerParts], images: Tensor) -> Tensor:
    """The definition: each layer reads the concatenation of all before it (arXiv:1608.06993, equation 2)."""
    for layer in layers:
        new = images
        for norm, conv in zip(layer.norms, layer.convolutions, strict=True):
            new = conv(F.relu(_normalise(norm, new)))
        images = torch.cat([images, F.dropout(new, layer.drop_rate, layer.training) if layer.drop_rate else new], 1)
    return images


def _normalise(norm: BatchNorm, images: Tensor) -> Tensor:
    """The norm without an update of its buffers: the forward on trial shall find them as this one did."""
    if fusion.uses_batch_statistics(norm):
        return F.batch_norm(images, None, None, norm.weight, norm.bias, True, 0.0, norm.eps)
    return F.batch_norm(images, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, norm.eps)


def _are_equal(features: object, expected: Tensor) -> bool:
    """Channel by channel."""
    if not isinstance(features, Tensor) or features.shape != expected.shape:
        return False
    errors, sizes = ((tensor.transpose(0, 1).flatten(1).norm(dim=1)) for tensor in (features - expected, expected))
    return bool((errors <= TOLERANCE * sizes).all())
