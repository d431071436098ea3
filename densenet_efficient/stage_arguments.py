"""What the operator of a stage takes from its modules, and what they take from its results."""

from __future__ import annotations

from torch import Tensor

from .dimensions import BatchNorm, Convolution
from .dropout import draw_mask
from .fusion import LayerParts, StageExit
from .layout import as_rows
from .module_tensors import tensor_of
from .running_statistics import Update, is_due, moments, updates_of


def parameters_of(layer: LayerParts) -> list[Tensor]:
    """Of each norm and the convolution behind it, in the operator's order."""
    parameters: list[Tensor] = []
    for norm, conv in zip(layer.norms, layer.convolutions, strict=True):
        parameters += tensor_of(norm, "weight"), tensor_of(norm, "bias"), tensor_of(conv, "weight")
    return parameters


def parameters_of_exit(stage_exit: StageExit) -> list[Tensor]:
    """The same of what consumes the block; empty without a norm."""
    norm, conv = stage_exit.norm, stage_exit.conv
    parameters: list[Tensor] = [] if norm is None else [norm.weight, norm.bias]
    return parameters if conv is None else [*parameters, conv.weight]


def norms_of(layers: list[LayerParts], stage_exit: StageExit) -> list[BatchNorm]:
    """Of a stage, in the operator's order."""
    norms: list[BatchNorm] = [norm for layer in layers for norm in layer.norms]
    return norms if stage_exit.norm is None else [*norms, stage_exit.norm]


def running_of(norm: BatchNorm) -> list[Tensor]:
    """The mean and variance of a norm that uses its running statistics."""
    assert norm.running_mean is not None and norm.running_var is not None
    return [norm.running_mean, norm.running_var]


def draw_masks(layers: list[LayerParts], exit_conv: Convolution | None, x: Tensor) -> tuple[float, list[Tensor]]:
    """The dropout's masks, [M, k] per layer and [M, C'] of a transition down with ``exit_conv``."""
    rate, is_dropping, drops_channels = layers[0].dropout
    if not is_dropping:
        return 0.0, []
    masks = []
    for channels in [layer.channels[-1] for layer in layers] + ([exit_conv.out_channels] if exit_conv else []):
        shape = (x.shape[0], channels, *x.shape[2:])
        drawn = (*shape[:2], *[1] * (x.dim() - 2)) if drops_channels else shape
        masks.append(as_rows(draw_mask(x, drawn, rate).expand(shape)))
    return rate, masks


def stage_updates(
    layers: list[LayerParts],
    exit_norm: BatchNorm | None,
    statistics: Tensor,
    bottleneck_statistics: Tensor,
    count: int | Tensor,
) -> list[Update]:
    """Shared statistics, one running copy per consumer."""
    norms = [layer.norm1 for layer in layers] + ([exit_norm] if exit_norm is not None else [])
    bottleneck_norms = [layer.norms[1] for layer in layers] if layers[0].bottleneck else []
    if not any(map(is_due, [*norms, *bottleneck_norms])):
        return []
    mean, variance = moments(statistics, count)
    shares = [(mean[: norm.num_features], variance[: norm.num_features]) for norm in norms]
    if bottleneck_norms:
        means, variances = moments(bottleneck_statistics, count)
        shares += zip(means.unbind(), variances.unbind(), strict=True)
    return updates_of([*norms, *bottleneck_norms], shares, count)
