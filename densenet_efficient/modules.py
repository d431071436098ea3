"""The modules of a DenseNet: parameters under torchvision's names, and how a forward is grouped into operators.

`Features` walks its children and hands runs of them to one operator: (conv, norm, relu, max pool) is the stem, a dense
block with the transition or norm that consumes it is a stage. Whatever a user observes or replaces (a hook, a
parametrization, another module class) runs through its modules instead, with the same result, and says so once.
"""

from __future__ import annotations

import warnings
from typing import cast
from weakref import WeakSet

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import fusion, inference, operators
from .dense_block import HEAD, NO_EXIT, TRANSITION, as_rows
from .fusion import LayerParts
from .input_checks import as_compute_dtype, check_count, check_images, check_input, check_poolable, convolved_pixels
from .running_statistics import update_running_statistics
from .synchronisation import BATCH_NORMS, exchange_counts, group_of_all

CHECKPOINTING_LEVELS = ("none", "bottleneck")


class DenseLayer(nn.Module):
    """BN-ReLU-conv1x1-BN-ReLU-conv3x3 (arXiv:1608.06993, section 3), or BN-ReLU-conv3x3 without the bottleneck.

    Its own ``forward`` is plain torch; it serves where a block runs layer by layer.
    """

    norm2: nn.BatchNorm2d  # with a bottleneck only, as conv2
    conv2: nn.Conv2d

    def __init__(
        self, num_input_features: int, growth_rate: int, bn_size: int, drop_rate: float, bottleneck: bool = True
    ) -> None:
        super().__init__()
        width = bn_size * growth_rate if bottleneck else growth_rate
        self.norm1 = nn.BatchNorm2d(num_input_features)
        self.relu1 = nn.ReLU(inplace=True)
        if bottleneck:
            self.conv1 = nn.Conv2d(num_input_features, width, kernel_size=1, bias=False)
            self.norm2 = nn.BatchNorm2d(width)
            self.relu2 = nn.ReLU(inplace=True)
            self.conv2 = nn.Conv2d(width, growth_rate, kernel_size=3, padding=1, bias=False)
        else:
            self.conv1 = nn.Conv2d(num_input_features, growth_rate, kernel_size=3, padding=1, bias=False)
        self.drop_rate = float(drop_rate)

    @property
    def bottleneck(self) -> bool:
        """Whether the layer has the 1x1 convolution."""
        return "conv2" in self._modules

    def forward(self, x: Tensor | list[Tensor]) -> Tensor:
        """The k new channels [N, k, H, W] from all earlier ones [N, C, H, W], whole or as a list to concatenate."""
        features = x if isinstance(x, Tensor) else torch.cat(x, 1)
        out = self.conv1(self.relu1(self.norm1(features)))
        if self.bottleneck:
            out = self.conv2(self.relu2(self.norm2(out)))
        return F.dropout(out, self.drop_rate, self.training) if self.drop_rate > 0 else out


class StageBlock(nn.Module):
    """A dense block that runs as one operator; through its modules, and saying so once, where that is impossible."""

    checkpointing: str

    def read(self) -> list[LayerParts] | str:
        """The layers as the operator takes them, or what is in the way."""
        raise NotImplementedError

    def forward_by_layers(self, x: Tensor) -> Tensor:
        """The same through the modules' own ``forward``: hooks run, nothing is fused."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        layers = "torch.fx traces its modules" if fusion.is_traced(x) else self.read()
        if not isinstance(layers, str):
            return run_stage(self, layers, None, x)[1]
        _announce(self, layers)
        return self.forward_by_layers(x)


class DenseBlock(StageBlock, nn.ModuleDict):
    """Dense layers, each reading all channels before it; ``forward`` gives all channels [N, C0 + L*k, H, W].

    Args:
        num_layers: L.
        num_input_features: C0.
        bn_size: bottleneck channels per growth rate.
        growth_rate: k.
        drop_rate: of the dropout after each layer.
        bottleneck: whether the layers have their 1x1 convolution.
        checkpointing: "none" saves the bottleneck outputs for the backward, "bottleneck" recomputes them.
    """

    def __init__(
        self,
        num_layers: int,
        num_input_features: int,
        bn_size: int,
        growth_rate: int,
        drop_rate: float,
        bottleneck: bool = True,
        checkpointing: str = "bottleneck",
    ) -> None:
        super().__init__()
        self.checkpointing = checkpointing
        for index in range(num_layers):
            channels = num_input_features + index * growth_rate
            self[f"denselayer{index + 1}"] = DenseLayer(channels, growth_rate, bn_size, drop_rate, bottleneck)

    def read(self) -> list[LayerParts] | str:
        """The layers as the operator takes them, or what is in the way."""
        return fusion.read_block(self, _read_layer)

    def forward_by_layers(self, x: Tensor) -> Tensor:
        """The same through the modules' own ``forward``: hooks run, nothing is fused."""
        features = [x]
        for layer in self.values():
            features.append(layer(features))
        return torch.cat(features, 1)


def _read_layer(layer: nn.Module) -> LayerParts | str:
    if type(layer) is not DenseLayer:
        return f" is a {type(layer).__name__}, not a {DenseLayer.__name__}"
    if fusion.is_observed(layer):
        return " has a hook"
    kinds = ("norm", "relu", "conv")
    if set(layer._modules) != {f"{kind}{index}" for kind in kinds for index in ("12" if layer.bottleneck else "1")}:
        return " has other submodules than its norms, ReLUs and convolutions"
    return fusion.read_layer(layer._modules, layer.drop_rate, layer.training)


class Transition(nn.Sequential):
    """BN-ReLU-conv1x1-average pooling between two blocks (arXiv:1608.06993, section 3)."""

    def __init__(self, num_input_features: int, num_output_features: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(num_input_features)
        self.relu = nn.ReLU(inplace=True)
        self.conv = nn.Conv2d(num_input_features, num_output_features, kernel_size=1, bias=False)
        self.pool = nn.AvgPool2d(kernel_size=2, stride=2)


class Features(nn.Sequential):
    """Everything before the classifier, under torchvision's names; ``forward`` gives the output of the last norm."""

    def forward(self, x: Tensor) -> Tensor:
        return self._run(x, with_head=False)[0]

    def pooled(self, x: Tensor) -> Tensor:
        """relu(forward(x)) averaged over each image, [N, C]; the last norm joins the last block's stage."""
        if fusion.is_observed(self) or fusion.any_global_hook():
            return global_average(self(x))
        out, is_pooled = self._run(x, with_head=True)
        return out if is_pooled else global_average(out)

    def _run(self, x: Tensor, with_head: bool) -> tuple[Tensor, bool]:
        return run_children(list(self.children()), x, with_head)


def run_children(children: list[nn.Module], x: Tensor, with_head: bool) -> tuple[Tensor, bool]:
    """Runs a sequence, as many children as one operator takes at a time.

    ``with_head``: a last norm joins the last block, and what follows is known to be ReLU and average pooling.
    Returns the output, and whether it is [N, C], pooled already.
    """
    while children:
        traced = fusion.is_traced(x)
        stem, stage = (None, None) if traced else (fusion.take_stem(children), take_stage(children, with_head))
        if stem is not None:
            conv, norm, rest = stem
            x, children = run_stem(conv, norm, x, saves_conv(children)), rest
        elif stage is not None:
            block, layers, consumer = stage
            x, children = run_stage(block, layers, consumer, x)[0], children[2:]
            if isinstance(consumer, BATCH_NORMS):
                return x, True
        else:
            x, children = children[0](x), children[1:]
    return x, False


def take_stage(children: list[nn.Module], with_head: bool) -> tuple[StageBlock, list[LayerParts], nn.Module] | None:
    """A dense block that comes first, with its layers and the consumer behind it that may join it as its exit."""
    if len(children) < 2:
        return None
    block, consumer = children[:2]
    if not isinstance(block, StageBlock) or type(block).forward is not StageBlock.forward or fusion.is_observed(block):
        return None
    is_head = with_head and len(children) == 2 and is_last_norm(consumer)
    if not is_head and fusion.transition_parts(consumer) is None:
        return None
    layers = block.read()
    return None if isinstance(layers, str) else (block, layers, consumer)


def is_last_norm(module: nn.Module) -> bool:
    """Whether ``module`` may join the last block as its exit."""
    return fusion.is_plain_norm(module) or fusion.holds_norm_and_relu(module)


def run_stage(
    block: StageBlock, layers: list[LayerParts], consumer: nn.Module | None, x: Tensor
) -> tuple[Tensor, Tensor]:
    """Runs a dense block, whose layers were read, and the transition or last norm that consumes it.

    Returns the consumer's output (empty without one) and the block's features [N, C, H, W], and updates the running
    statistics of every norm, once.
    """
    if inference.applies(x):
        plan = inference.kept_plan(block, consumer) or inference.make_plan(_stage_modules(block, layers, consumer))
        if plan is not None:
            return _run_plan(plan, x)
    norms: list[nn.BatchNorm2d] = [norm for layer in layers for norm in layer.norms]
    stage_exit, exit_norm, exit_conv = _describe_exit(consumer)
    exit_parameters: list[Tensor] = []
    if exit_norm is not None:
        norms.append(exit_norm)
        exit_parameters += [exit_norm.weight, exit_norm.bias]
    if exit_conv is not None:
        exit_parameters.append(exit_conv.weight)
    check_input(layers[0].norm1, x)
    if consumer is not None and stage_exit == TRANSITION:
        check_poolable(exit_norm, x)
    group = group_of_all(norms)
    count = x.shape[0] * x.shape[2] * x.shape[3]
    counts = exchange_counts(count, group, x)
    if counts is None:
        check_count(norms, x)
    x = as_compute_dtype(x, _convolution_weights(layers, exit_parameters))
    drop_rate, masks = _draw_masks(layers, x)
    out, features, statistics, bottleneck_statistics, _ = operators.dense_stage(
        x,
        [parameter for layer in layers for parameter in _parameters(layer)],
        exit_parameters,
        [statistic for norm in norms if not fusion.uses_batch_statistics(norm) for statistic in _running(norm)],
        masks,
        [norm.eps for norm in norms],
        [not fusion.uses_batch_statistics(norm) for norm in norms],
        layers[0].bottleneck,
        stage_exit,
        drop_rate,
        block.checkpointing == "none" and torch.is_grad_enabled(),
        counts,
        group,
    )
    total = count if counts is None else counts.sum()
    _update_stage_statistics(layers, exit_norm, statistics, bottleneck_statistics, total)
    return out, features


def _stage_modules(block: StageBlock, layers: list[LayerParts], consumer: nn.Module | None) -> inference.Stage:
    convolutions = [conv for layer in layers for conv in layer.convolutions]
    norms = [norm for layer in layers for norm in layer.norms]
    stage_exit, exit_norm, exit_conv = _describe_exit(consumer)
    return inference.Stage(block, consumer, norms, convolutions, stage_exit, exit_norm, exit_conv)


def _run_plan(plan: inference.Plan, x: Tensor) -> tuple[Tensor, Tensor]:
    check_input(plan.norms[0], x)
    if plan.exit == TRANSITION:
        check_poolable(plan.exit_norm, x)
    return plan.run(as_compute_dtype(x, [plan.weight]))


def run_stem(conv: nn.Conv2d, norm: nn.BatchNorm2d, x: Tensor, save_conv: bool) -> Tensor:
    """Runs (conv, norm, relu, max pool) as one operator and updates the norm's running statistics."""
    check_images(conv, x)
    x = as_compute_dtype(x, [conv.weight])
    batch = fusion.uses_batch_statistics(norm)
    group = group_of_all([norm])
    count = x.shape[0] * convolved_pixels(conv, x)
    counts = exchange_counts(count, group, x)
    if batch and count == 1 and counts is None:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {tuple(x.shape)}")
    running = [] if batch else _running(norm)
    out, statistics, _ = operators.stem(
        x, conv.weight, norm.weight, norm.bias, running, list(conv.stride), list(conv.padding), norm.eps,
        save_conv and torch.is_grad_enabled(), counts, group,
    )  # fmt: skip
    update_running_statistics([norm], [statistics], count if counts is None else counts.sum())
    return out


_announced: WeakSet[nn.Module] = WeakSet()


def _announce(block: nn.Module, reason: str) -> None:
    if block not in _announced and not torch.compiler.is_compiling():
        _announced.add(block)
        warnings.warn(f"a dense block runs layer by layer, with more memory and time: {reason}", stacklevel=3)


def saves_conv(children: list[nn.Module]) -> bool:
    """The stem follows the level of the first block."""
    block = next((child for child in children if isinstance(child, StageBlock)), None)
    return block is not None and block.checkpointing == "none"


def _describe_exit(consumer: nn.Module | None) -> tuple[str, nn.BatchNorm2d | None, nn.Conv2d | None]:
    if consumer is None:
        return NO_EXIT, None, None
    if isinstance(consumer, BATCH_NORMS):
        return HEAD, cast(nn.BatchNorm2d, consumer), None
    parts = fusion.transition_parts(consumer)
    assert parts is not None
    return TRANSITION, *parts


def _parameters(layer: LayerParts) -> list[Tensor]:
    parts = zip(layer.norms, layer.convolutions, strict=True)
    return [tensor for norm, conv in parts for tensor in (norm.weight, norm.bias, conv.weight)]


def _running(norm: nn.BatchNorm2d) -> list[Tensor]:
    assert norm.running_mean is not None and norm.running_var is not None
    return [norm.running_mean, norm.running_var]


def _convolution_weights(layers: list[LayerParts], exit_parameters: list[Tensor]) -> list[Tensor]:
    return [*(conv.weight for layer in layers for conv in layer.convolutions), *exit_parameters[2:]]


def _draw_masks(layers: list[LayerParts], x: Tensor) -> tuple[float, list[Tensor]]:
    """The dropout's masks [M, k], drawn in the order in which F.dropout draws them for contiguous features."""
    rate, training, drops_channels = layers[0].dropout
    if rate == 0 or not training:
        return 0.0, []
    shape = (x.shape[0], layers[0].channels[-1], *x.shape[2:])
    drawn = (*shape[:2], 1, 1) if drops_channels else shape
    masks = [x.new_empty(drawn, dtype=torch.bool).bernoulli_(1 - rate).expand(shape) for _ in layers]
    return rate, [as_rows(mask) for mask in masks]


def global_average(features: Tensor) -> Tensor:
    return F.adaptive_avg_pool2d(F.relu(features), (1, 1)).flatten(1)


def _update_stage_statistics(
    layers: list[LayerParts],
    exit_norm: nn.BatchNorm2d | None,
    statistics: Tensor,
    bottleneck_statistics: Tensor,
    count: int | Tensor,
) -> None:
    """Shared statistics, one running copy per consumer."""
    norms = [layer.norm1 for layer in layers] + ([exit_norm] if exit_norm is not None else [])
    shares = [statistics[:, : norm.num_features] for norm in norms]
    if layers[0].bottleneck:
        norms += [layer.norms[1] for layer in layers]
        shares += list(bottleneck_statistics.unbind(0))
    update_running_statistics(norms, shares, count)
