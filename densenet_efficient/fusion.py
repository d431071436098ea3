"""Which modules may run as one operator: those that are exactly what it computes, and that nobody observes."""

from __future__ import annotations

from torch import nn
from torch.nn.modules import module as module_hooks


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


def any_global_hook() -> bool:
    """Whether hooks are registered for all modules (register_module_forward_hook and others)."""
    return bool(
        module_hooks._global_forward_hooks
        or module_hooks._global_forward_pre_hooks
        or module_hooks._global_backward_hooks
        or module_hooks._global_backward_pre_hooks
    )


def obstacle(block: nn.ModuleDict, layer_type: type[nn.Module]) -> str | None:
    """Why the layers of ``block`` cannot run as one operator; None where they can."""
    if any_global_hook():
        return "hooks are registered for all modules"
    layers = list(block.items())
    if not layers:
        return "it has no layers"
    channels = _num_features(layers[0][1])
    for name, layer in layers:
        if type(layer) is not layer_type:
            return f"{name} is a {type(layer).__name__}, not a {layer_type.__name__}"
        reason = _layer_obstacle(layer, layers[0][1], channels)
        if reason is not None:
            return f"{name}{reason}"
        channels += _growth_rate(layer)
    return None


def is_stem(children: list[nn.Module]) -> bool:
    """Whether the first four are conv, norm, relu and the 3x3 maximum pooling of the paper."""
    if len(children) < 4 or any_global_hook():
        return False
    conv, norm, relu, pool = children[:4]
    return (
        type(conv) is nn.Conv2d
        and _is_plain_conv(conv)
        and is_plain_norm(norm)
        and _is_plain(relu, nn.ReLU)
        and _is_plain(pool, nn.MaxPool2d)
        and _pooling(pool) == (3, 2, 1, 1, False, False)
    )


def _layer_obstacle(layer: nn.Module, first: nn.Module, channels: int) -> str | None:
    if is_observed(layer):
        return " has a hook"
    kernel_sizes = {"conv1": 1, "conv2": 3} if layer.bottleneck else {"conv1": 3}
    if set(layer._modules) != set(kernel_sizes) | {name.replace("conv", "norm") for name in kernel_sizes} | {
        name.replace("conv", "relu") for name in kernel_sizes
    }:
        return " has other submodules than its norms, ReLUs and convolutions"
    for name, size in kernel_sizes.items():
        index = name[-1]
        if not is_plain_norm(layer._modules[f"norm{index}"]):
            return f".norm{index} is replaced, observed or without affine parameters"
        if not _is_plain(layer._modules[f"relu{index}"], nn.ReLU):
            return f".relu{index} is replaced or observed"
        conv = layer._modules[name]
        if not _is_plain_conv(conv) or _geometry(conv) != ((size, size), (1, 1), (size // 2, size // 2)):
            return f".{name} is replaced, observed or of another geometry"
    if _num_features(layer) != channels or _shape(layer) != _shape(first):
        return " has other channel counts than its place in the block asks for"
    if (layer.drop_rate, layer.training) != (first.drop_rate, first.training):
        return " has a dropout of its own"
    return None


def _is_plain(module: nn.Module | None, kind: type[nn.Module]) -> bool:
    return type(module) is kind and not is_observed(module)


def is_plain_norm(module: nn.Module | None) -> bool:
    """Whether ``module`` is a BatchNorm2d with gamma and beta, unobserved."""
    return _is_plain(module, nn.BatchNorm2d) and isinstance(module, nn.BatchNorm2d) and module.affine


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


def is_plain_transition(transition: nn.Sequential) -> bool:
    """Whether ``transition`` is norm, ReLU, 1x1 convolution and 2x2 average pooling, unobserved."""
    if is_observed(transition) or list(transition._modules) != ["norm", "relu", "conv", "pool"]:
        return False
    norm, relu, conv, pool = transition
    return (
        is_plain_norm(norm)
        and _is_plain(relu, nn.ReLU)
        and _is_plain_conv(conv)
        and _geometry(conv) == ((1, 1), (1, 1), (0, 0))
        and _is_plain(pool, nn.AvgPool2d)
        and isinstance(pool, nn.AvgPool2d)
        and (_scalar(pool.kernel_size), _scalar(pool.stride), _scalar(pool.padding)) == (2, 2, 0)
        and not pool.ceil_mode
        and pool.divisor_override is None
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


def _num_features(layer: nn.Module) -> int:
    norm = layer._modules.get("norm1")
    return norm.num_features if isinstance(norm, nn.BatchNorm2d) else -1


def _growth_rate(layer: nn.Module) -> int:
    return _shape(layer)[-1]


def _shape(layer: nn.Module) -> tuple[int, ...]:
    """The channels that every layer of a block has in common: (bottleneck,) growth rate."""
    return tuple(module.out_channels for module in layer._modules.values() if isinstance(module, nn.Conv2d))
