"""Which modules may run as one operator: those that are exactly what it computes, and that nobody observes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import cast

from torch import nn
from torch.fx import Proxy
from torch.nn.modules import module as module_hooks

from .synchronisation import BATCH_NORMS

BATCH_NORM_WITH_ACTIVATION = ("timm.layers.norm_act", "BatchNormAct2d")


def uses_batch_statistics(norm: nn.BatchNorm2d) -> bool:
    """Whether ``norm`` normalises by the batch (as torch.nn.BatchNorm2d decides it)."""
    return norm.training or norm.running_mean is None or norm.running_var is None


def is_observed(module: nn.Module) -> bool:
    """Whether a call of ``module`` has effects besides its forward: hooks, or a forward set on the instance."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in vars(module)
    )


def is_traced(x: object) -> bool:
    """Whether torch.fx traces the forward of ``x``, and wants to see its modules."""
    return isinstance(x, Proxy)


def any_global_hook() -> bool:
    """Whether hooks are registered for all modules (register_module_forward_hook and others)."""
    return bool(
        module_hooks._global_forward_hooks
        or module_hooks._global_forward_pre_hooks
        or module_hooks._global_backward_hooks
        or module_hooks._global_backward_pre_hooks
    )


@dataclass
class LayerParts:
    """What a dense layer computes with, whatever its class; without a bottleneck there is neither norm2 nor conv2."""

    norm1: nn.BatchNorm2d
    conv1: nn.Conv2d
    norm2: nn.BatchNorm2d | None
    conv2: nn.Conv2d | None
    drop_rate: float
    training: bool  # of the dropout
    drops_channels: bool = False  # whole channels, as nn.Dropout2d does

    @property
    def bottleneck(self) -> bool:
        """Whether the layer has the 1x1 convolution."""
        return self.conv2 is not None

    @property
    def norms(self) -> list[nn.BatchNorm2d]:
        """norm1 and, with a bottleneck, norm2."""
        return [self.norm1] if self.norm2 is None else [self.norm1, self.norm2]

    @property
    def convolutions(self) -> list[nn.Conv2d]:
        """conv1 and, with a bottleneck, conv2."""
        return [self.conv1] if self.conv2 is None else [self.conv1, self.conv2]

    @property
    def channels(self) -> list[int]:
        """What every layer of a block has in common: [bottleneck channels,] growth rate."""
        return [conv.out_channels for conv in self.convolutions]

    @property
    def dropout(self) -> tuple[float, bool, bool]:
        return self.drop_rate, self.training, self.drops_channels


def read_block(block: nn.Module, read: Callable[[nn.Module], LayerParts | str]) -> list[LayerParts] | str:
    """The layers of ``block`` as ``read`` finds them, or why they cannot run as one operator."""
    if any_global_hook():
        return "hooks are registered for all modules"
    layers: list[LayerParts] = []
    for name, layer in block._modules.items():
        parts = read(cast(nn.Module, layer))
        if isinstance(parts, str):
            return f"{name}{parts}"
        if layers and not _follows(layers, parts):
            return f"{name} has other channel counts than its place in the block asks for"
        if layers and parts.dropout != layers[0].dropout:
            return f"{name} has a dropout of its own"
        layers.append(parts)
    return layers or "it has no layers"


def _follows(layers: list[LayerParts], parts: LayerParts) -> bool:
    """Whether ``parts`` has the channels of a layer that stands behind ``layers``."""
    first = layers[0]
    growth = len(layers) * first.channels[-1]
    return parts.channels == first.channels and parts.norm1.num_features == first.norm1.num_features + growth


def read_layer(modules: Mapping[str, nn.Module | None], drop_rate: float, training: bool) -> LayerParts | str:
    """The parts of a layer from its modules by name (norm1, relu1, conv1, norm2, relu2, conv2), or what is in the way.

    A norm of timm's that holds its ReLU needs no relu1. Other names are for the caller to allow or to refuse.
    """
    bottleneck = modules.get("conv2") is not None
    for index, size in (("1", 1), ("2", 3)) if bottleneck else (("1", 3),):
        norm, conv = modules.get(f"norm{index}"), modules.get(f"conv{index}")
        if not holds_norm_and_relu(norm):
            if not is_plain_norm(norm):
                return f".norm{index} {_what_is_wrong_with(norm)}"
            if not _is_plain(modules.get(f"relu{index}"), nn.ReLU):
                return f".relu{index} is replaced or observed"
        if not _is_plain_conv(conv) or _geometry(conv) != ((size, size), (1, 1), (size // 2, size // 2)):
            return f".conv{index} is replaced, observed or of another geometry"
    norms = [cast(nn.BatchNorm2d, modules.get(name)) for name in ("norm1", "norm2")]
    convolutions = [cast(nn.Conv2d, modules.get(name)) for name in ("conv1", "conv2")]
    parts = LayerParts(norms[0], convolutions[0], norms[1], convolutions[1], drop_rate, training)
    if any(conv.in_channels != norm.num_features for conv, norm in zip(parts.convolutions, parts.norms, strict=True)):
        return " has other channel counts than its norms"
    return parts


def _what_is_wrong_with(norm: nn.Module | None) -> str:
    if isinstance(norm, nn.BatchNorm3d | nn.BatchNorm1d):
        return f"is a {type(norm).__name__}; only two dimensions are supported"
    if is_class(norm, *BATCH_NORM_WITH_ACTIVATION) and norm is not None:
        return f"holds a {type(norm._modules['act']).__name__}, is observed or without affine parameters; expected ReLU"
    return f"is a {type(norm).__name__}, observed or without affine parameters; expected BatchNorm2d"


def take_norm_relu(modules: list[nn.Module]) -> tuple[nn.BatchNorm2d, list[nn.Module]] | None:
    """The norm that comes first, with its ReLU, and what follows them; None where something else comes."""
    if modules and holds_norm_and_relu(modules[0]):
        return cast(nn.BatchNorm2d, modules[0]), modules[1:]
    if len(modules) > 1 and is_plain_norm(modules[0]) and _is_plain(modules[1], nn.ReLU):
        return cast(nn.BatchNorm2d, modules[0]), modules[2:]
    return None


def take_stem(children: list[nn.Module]) -> tuple[nn.Conv2d, nn.BatchNorm2d, list[nn.Module]] | None:
    """The stem's convolution and norm, and what follows its pooling.

    None unless conv, norm, ReLU and the 3x3 maximum pooling of the paper come first.
    """
    if not children or any_global_hook() or not (type(children[0]) is nn.Conv2d and _is_plain_conv(children[0])):
        return None
    taken = take_norm_relu(children[1:])
    if taken is None or not taken[1]:
        return None
    norm, (pool, *rest) = taken
    if not _is_plain(pool, nn.MaxPool2d) or _pooling(pool) != (3, 2, 1, 1, False, False):
        return None
    return children[0], norm, rest


def transition_parts(transition: nn.Module) -> tuple[nn.BatchNorm2d, nn.Conv2d] | None:
    """The norm and the convolution of a plain transition.

    None unless it is a sequence of norm, ReLU, 1x1 convolution and 2x2 average pooling, unobserved.
    """
    if not isinstance(transition, nn.Sequential) or type(transition).forward is not nn.Sequential.forward:
        return None
    taken = take_norm_relu(list(transition))
    if is_observed(transition) or taken is None or len(taken[1]) != 2:
        return None
    norm, (conv, pool) = taken
    plain = (
        _is_plain_conv(conv)
        and _geometry(conv) == ((1, 1), (1, 1), (0, 0))
        and _is_plain(pool, nn.AvgPool2d)
        and isinstance(pool, nn.AvgPool2d)
        and (_scalar(pool.kernel_size), _scalar(pool.stride), _scalar(pool.padding)) == (2, 2, 0)
        and not pool.ceil_mode
        and pool.divisor_override is None
    )
    return (norm, cast(nn.Conv2d, conv)) if plain else None


def is_class(module: object, source: str, name: str) -> bool:
    """Whether ``module`` is of exactly this class of another library, which need not be installed."""
    return type(module).__module__ == source and type(module).__name__ == name


def _is_plain(module: nn.Module | None, kind: type[nn.Module]) -> bool:
    return type(module) is kind and not is_observed(module)


def is_plain_norm(module: nn.Module | None) -> bool:
    """Whether ``module`` is a BatchNorm2d, or its synchronised form, with gamma and beta, unobserved."""
    return isinstance(module, BATCH_NORMS) and type(module) in BATCH_NORMS and not is_observed(module) and module.affine


def holds_norm_and_relu(module: nn.Module | None) -> bool:
    """Whether ``module`` is a BatchNormAct2d of timm's with gamma, beta and a ReLU, unobserved."""
    return (
        is_class(module, *BATCH_NORM_WITH_ACTIVATION)
        and isinstance(module, nn.BatchNorm2d)
        and not is_observed(module)
        and module.affine
        and _is_plain(module._modules["act"], nn.ReLU)
        and _is_plain(module._modules["drop"], nn.Identity)
    )


def _is_plain_conv(module: nn.Module | None) -> bool:
    return (
        _is_plain(module, nn.Conv2d)
        and isinstance(module, nn.Conv2d)
        and module.bias is None
        and module.groups == 1
        and module.dilation == (1, 1)
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
    )


def _geometry(conv: nn.Module | None) -> tuple[object, object, object]:
    assert isinstance(conv, nn.Conv2d)
    return conv.kernel_size, conv.stride, conv.padding


def _pooling(pool: nn.Module) -> tuple[object, ...]:
    assert isinstance(pool, nn.MaxPool2d)
    sizes = map(_scalar, (pool.kernel_size, pool.stride, pool.padding, pool.dilation))
    return (*sizes, pool.return_indices, pool.ceil_mode)


def _scalar(size: object) -> object:
    """A square size as one number."""
    return size[0] if isinstance(size, tuple) and len(set(size)) == 1 else size
