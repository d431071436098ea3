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
from .input_checks import as_compute_dtype, check_count, check_images, check_input, check_poolable, convolved_pixels
from .running_statistics import update_running_statistics

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

    @property
    def norms(self) -> list[nn.BatchNorm2d]:
        """norm1 and, with a bottleneck, norm2."""
        return [self.norm1, self.norm2] if self.bottleneck else [self.norm1]

    @property
    def convolutions(self) -> list[nn.Conv2d]:
        """conv1 and, with a bottleneck, conv2."""
        return [self.conv1, self.conv2] if self.bottleneck else [self.conv1]

    def forward(self, x: Tensor | list[Tensor]) -> Tensor:
        """The k new channels [N, k, H, W] from all earlier ones [N, C, H, W], whole or as a list to concatenate."""
        features = x if isinstance(x, Tensor) else torch.cat(x, 1)
        out = self.conv1(self.relu1(self.norm1(features)))
        if self.bottleneck:
            out = self.conv2(self.relu2(self.norm2(out)))
        return F.dropout(out, self.drop_rate, self.training) if self.drop_rate > 0 else out


class DenseBlock(nn.ModuleDict):
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

    @property
    def layers(self) -> list[DenseLayer]:
        """The layers in order; their class is checked by `fusion.obstacle` before."""
        return cast(list[DenseLayer], list(self.values()))

    def forward(self, x: Tensor) -> Tensor:
        reason = fusion.obstacle(self, DenseLayer)
        if reason is None:
            return run_stage(self, None, x)[1]
        _announce(self, reason)
        return self.forward_by_layers(x)

    def forward_by_layers(self, x: Tensor) -> Tensor:
        """The same through the modules' own ``forward``: hooks run, nothing is fused."""
        features = [x]
        for layer in self.values():
            features.append(layer(features))
        return torch.cat(features, 1)


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
        """Runs the children, as many as one operator takes at a time; whether the head has pooled already."""
        children = list(self.children())
        while children:
            if fusion.is_stem(children):
                x, children = run_stem(children[:4], x, _saves_conv(children)), children[4:]
            elif _is_stage(children, with_head):
                block, consumer, children = cast(DenseBlock, children[0]), children[1], children[2:]
                x = run_stage(block, consumer, x)[0]
                if isinstance(consumer, nn.BatchNorm2d):
                    return x, True
            else:
                x, children = children[0](x), children[1:]
        return x, False


def _is_stage(children: list[nn.Module], with_head: bool) -> bool:
    """Whether a dense block comes first, and second a consumer that may join it as its exit."""
    if len(children) < 2 or type(children[0]) is not DenseBlock or fusion.is_observed(children[0]):
        return False
    consumer = children[1]
    is_exit = type(consumer) is Transition and fusion.is_plain_transition(consumer)
    is_exit = is_exit or (with_head and len(children) == 2 and fusion.is_plain_norm(consumer))
    return is_exit and fusion.obstacle(children[0], DenseLayer) is None


def run_stage(block: DenseBlock, consumer: nn.Module | None, x: Tensor) -> tuple[Tensor, Tensor]:
    """Runs a dense block and the transition or last norm that consumes it.

    Returns the consumer's output (empty without one) and the block's features [N, C, H, W], and updates the running
    statistics of every norm, once.
    """
    if inference.applies(x):
        plan = inference.kept_plan(block, consumer) or inference.make_plan(_stage_modules(block, consumer))
        if plan is not None:
            return _run_plan(plan, x)
    layers = block.layers
    norms: list[nn.BatchNorm2d] = [norm for layer in layers for norm in layer.norms]
    stage_exit, exit_norm, exit_parameters = _describe_exit(consumer)
    norms += [exit_norm] if exit_norm is not None else []
    check_input(layers[0].norm1, x)
    if consumer is not None and stage_exit == TRANSITION:
        check_poolable(exit_norm, x)
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
    )
    _update_stage_statistics(layers, exit_norm, statistics, bottleneck_statistics, x)
    return out, features


def _stage_modules(block: DenseBlock, consumer: nn.Module | None) -> inference.Stage:
    convolutions = [conv for layer in block.layers for conv in layer.convolutions]
    stage_exit, exit_norm, _ = _describe_exit(consumer)
    exit_conv = consumer.conv if isinstance(consumer, Transition) else None
    norms = [norm for layer in block.layers for norm in layer.norms]
    return inference.Stage(block, consumer, norms, convolutions, stage_exit, exit_norm, exit_conv)


def _run_plan(plan: inference.Plan, x: Tensor) -> tuple[Tensor, Tensor]:
    check_input(plan.norms[0], x)
    if plan.exit == TRANSITION:
        check_poolable(plan.exit_norm, x)
    return plan.run(as_compute_dtype(x, [plan.weight]))


def run_stem(modules: list[nn.Module], x: Tensor, save_conv: bool) -> Tensor:
    """Runs (conv, norm, relu, max pool) as one operator and updates the norm's running statistics."""
    conv, norm = modules[0], modules[1]
    assert isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d)
    check_images(conv, x)
    x = as_compute_dtype(x, [conv.weight])
    batch = fusion.uses_batch_statistics(norm)
    if batch and x.shape[0] * convolved_pixels(conv, x) == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {tuple(x.shape)}")
    running = [] if batch else _running(norm)
    out, statistics, _ = operators.stem(
        x, conv.weight, norm.weight, norm.bias, running, list(conv.stride), list(conv.padding), norm.eps,
        save_conv and torch.is_grad_enabled(),
    )  # fmt: skip
    update_running_statistics([norm], [statistics], x.shape[0] * convolved_pixels(conv, x))
    return out


_announced: WeakSet[nn.Module] = WeakSet()


def _announce(block: DenseBlock, reason: str) -> None:
    if block not in _announced and not torch.compiler.is_compiling():
        _announced.add(block)
        warnings.warn(f"a dense block runs layer by layer, with more memory and time: {reason}", stacklevel=3)


def _saves_conv(children: list[nn.Module]) -> bool:
    """The stem follows the level of the first block."""
    block = next((child for child in children if isinstance(child, DenseBlock)), None)
    return block is not None and block.checkpointing == "none"


def _describe_exit(consumer: nn.Module | None) -> tuple[str, nn.BatchNorm2d | None, list[Tensor]]:
    if consumer is None:
        return NO_EXIT, None, []
    if isinstance(consumer, nn.BatchNorm2d):
        return HEAD, consumer, [consumer.weight, consumer.bias]
    norm, conv = consumer.norm, consumer.conv
    assert isinstance(norm, nn.BatchNorm2d) and isinstance(conv, nn.Conv2d)
    return TRANSITION, norm, [norm.weight, norm.bias, conv.weight]


def _parameters(layer: DenseLayer) -> list[Tensor]:
    first = [layer.norm1.weight, layer.norm1.bias, layer.conv1.weight]
    return [*first, layer.norm2.weight, layer.norm2.bias, layer.conv2.weight] if layer.bottleneck else first


def _running(norm: nn.BatchNorm2d) -> list[Tensor]:
    assert norm.running_mean is not None and norm.running_var is not None
    return [norm.running_mean, norm.running_var]


def _convolution_weights(layers: list[DenseLayer], exit_parameters: list[Tensor]) -> list[Tensor]:
    return [*(conv.weight for layer in layers for conv in layer.convolutions), *exit_parameters[2:]]


def _draw_masks(layers: list[DenseLayer], x: Tensor) -> tuple[float, list[Tensor]]:
    """The dropout's masks [M, k], drawn in the order in which F.dropout draws them for contiguous features."""
    rate = layers[0].drop_rate
    if rate == 0 or not layers[0].training:
        return 0.0, []
    growth_rate = (layers[0].conv2 if layers[0].bottleneck else layers[0].conv1).out_channels
    shape = (x.shape[0], growth_rate, *x.shape[2:])
    return rate, [as_rows(x.new_empty(shape, dtype=torch.bool).bernoulli_(1 - rate)) for _ in layers]


def global_average(features: Tensor) -> Tensor:
    return F.adaptive_avg_pool2d(F.relu(features), (1, 1)).flatten(1)


def _update_stage_statistics(
    layers: list[DenseLayer],
    exit_norm: nn.BatchNorm2d | None,
    statistics: Tensor,
    bottleneck_statistics: Tensor,
    x: Tensor,
) -> None:
    """Shared statistics, one running copy per consumer."""
    norms = [layer.norm1 for layer in layers] + ([exit_norm] if exit_norm is not None else [])
    shares = [statistics[:, : norm.num_features] for norm in norms]
    if layers[0].bottleneck:
        norms += [layer.norm2 for layer in layers]
        shares += list(bottleneck_statistics.unbind(0))
    update_running_statistics(norms, shares, x.shape[0] * x.shape[2] * x.shape[3])
