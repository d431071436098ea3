"""The modules of a DenseNet: parameters under torchvision's names, and how a forward is grouped into operators.

`Features` walks its children and hands runs of them to one operator: (conv, norm, relu, max pool) is the stem, a dense
block with the transition or norm that consumes it is a stage. Whatever a user observes or replaces (a hook, a
parametrization, another module class) runs through its modules instead, with the same result, and says so once.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from . import fusion, inference
from .argument_checks import check_drop_rate, check_kernel_size, check_positive, check_spatial_dims
from .dimensions import AVG_POOLS, BATCH_NORMS, CONVOLUTIONS, BatchNorm, Convolution, dims_of, global_average, is_for
from .dropout import dropout
from .fusion import LayerParts, StageExit
from .operator_calls import StageBlock, run_prepared, run_stage, run_stem
from .readings import read_once
from .running_statistics import Update, update_running_statistics
from .stage import HEAD


class DenseLayer(nn.Module):
    """BN-ReLU-conv1x1-BN-ReLU-conv3x3 (arXiv:1608.06993, section 3), or BN-ReLU-conv3x3 without the bottleneck.

    Its own ``forward`` is plain torch; it serves where a block runs layer by layer.

    Args:
        num_input_features: C, all channels that the layer reads.
        growth_rate: k, the channels that it gives.
        bn_size: the bottleneck has ``bn_size * growth_rate`` channels.
        drop_rate: of the dropout after the layer, in [0, 1).
        bottleneck: whether the layer has its 1x1 convolution.
        spatial_dims: 1, 2 or 3.
        kernel_size: of the last convolution along each axis, odd; the size of the images stays.
        dilation: of the last convolution.

    Raises:
        TypeError, ValueError: an argument is of another type or outside its range.
    """

    norm2: BatchNorm  # with a bottleneck only, as conv2
    conv2: Convolution

    def __init__(
        self,
        num_input_features: int,
        growth_rate: int,
        bn_size: int = 4,
        drop_rate: float = 0.0,
        bottleneck: bool = True,
        spatial_dims: int = 2,
        kernel_size: int = 3,
        dilation: int = 1,
    ) -> None:
        super().__init__()
        sizes = {"num_input_features": num_input_features, "growth_rate": growth_rate, "bn_size": bn_size}
        for name, value in (sizes | {"dilation": dilation}).items():
            check_positive(name, value)
        check_drop_rate(drop_rate)
        check_spatial_dims(spatial_dims)
        check_kernel_size(kernel_size)
        norm, convolution = BATCH_NORMS[spatial_dims], CONVOLUTIONS[spatial_dims]
        last: dict[str, Any] = {"padding": dilation * (kernel_size // 2), "dilation": dilation, "bias": False}
        self.norm1 = norm(num_input_features)
        self.relu1 = nn.ReLU(inplace=True)
        if bottleneck:
            width = bn_size * growth_rate
            self.conv1 = convolution(num_input_features, width, 1, bias=False)
            self.norm2 = norm(width)
            self.relu2 = nn.ReLU(inplace=True)
            self.conv2 = convolution(width, growth_rate, kernel_size, **last)
        else:
            self.conv1 = convolution(num_input_features, growth_rate, kernel_size, **last)
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
        return dropout(out, self.drop_rate, self.training)


class DenseBlock(StageBlock, nn.ModuleDict):
    """Dense layers over one storage, each reading all channels before it.

    ``forward`` takes [N, C0, H, W] of any layout ([N, C0, L] or [N, C0, D, H, W] with other ``spatial_dims``) and gives
    all channels [N, C0 + L*k, H, W], channels-last; to change them in place raises PyTorch's error in the backward.

    Args:
        num_layers: L.
        num_input_features: C0.
        bn_size: bottleneck channels per growth rate.
        growth_rate: k.
        drop_rate: of the dropout after each layer, in [0, 1).
        bottleneck: whether the layers have their 1x1 convolution.
        checkpointing: "none" saves the bottleneck outputs for the backward, "bottleneck" recomputes them.
        spatial_dims: 1 for signals, 2 for images, 3 for volumes.
        kernel_size: of the layers' last convolution along each axis, odd.
        dilation: of the same convolution; one for all layers, or one per layer.

    Raises:
        TypeError, ValueError: an argument is of another type or outside its range.
    """

    def __init__(
        self,
        num_layers: int,
        num_input_features: int,
        bn_size: int = 4,
        growth_rate: int = 32,
        drop_rate: float = 0.0,
        bottleneck: bool = True,
        checkpointing: str = "bottleneck",
        *,
        spatial_dims: int = 2,
        kernel_size: int = 3,
        dilation: int | Sequence[int] = 1,
    ) -> None:
        super().__init__()
        check_positive("num_layers", num_layers)
        self.checkpointing = checkpointing
        self.num_output_features = num_input_features
        for index, dilated in enumerate(_per_layer(dilation, num_layers)):
            self[f"denselayer{index + 1}"] = DenseLayer(
                self.num_output_features,
                growth_rate,
                bn_size,
                drop_rate,
                bottleneck,
                spatial_dims,
                kernel_size,
                dilated,
            )
            self.num_output_features += growth_rate

    def read(self) -> list[LayerParts] | str:
        """The layers as the operator takes them, or what is in the way."""
        return fusion.read_block(self, _read_layer)

    def forward_by_layers(self, x: Tensor) -> Tensor:
        """The same through the modules' own ``forward``: hooks run, nothing is fused."""
        features = [x]
        for layer in self.values():
            features = [*features, layer(features)]  # each layer its own list, which does not grow while it is kept
        return torch.cat(features, 1)


def _per_layer(dilation: Any, num_layers: int) -> list[int]:
    if not isinstance(dilation, int | Sequence) or isinstance(dilation, str):
        raise TypeError(f"dilation must be an int, or a sequence of one per layer, got {dilation!r}")
    dilations = [dilation] * num_layers if isinstance(dilation, int) else list(dilation)
    if len(dilations) != num_layers:
        raise ValueError(f"dilation must be one int or one per layer, {num_layers}, got {len(dilations)}: {dilation!r}")
    return dilations


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
    """BN-ReLU-conv1x1-average pooling between two blocks (arXiv:1608.06993, section 3): half the size along each axis.

    ``forward`` takes [N, C, H, W] and gives [N, C', H // 2, W // 2]. Behind a dense block in a `Features` or a
    converted sequence it joins the block's operator; alone it is plain torch.

    Args:
        num_input_features: C.
        num_output_features: C'.
        spatial_dims: 1, 2 or 3.

    Raises:
        TypeError, ValueError: an argument is of another type or outside its range.
    """

    def __init__(self, num_input_features: int, num_output_features: int, spatial_dims: int = 2) -> None:
        super().__init__()
        check_positive("num_input_features", num_input_features)
        check_positive("num_output_features", num_output_features)
        check_spatial_dims(spatial_dims)
        self.norm = BATCH_NORMS[spatial_dims](num_input_features)
        self.relu = nn.ReLU(inplace=True)
        self.conv = CONVOLUTIONS[spatial_dims](num_input_features, num_output_features, 1, bias=False)
        self.pool = AVG_POOLS[spatial_dims](kernel_size=2, stride=2)


class Features(nn.Sequential):
    """Everything before the classifier, under torchvision's names.

    ``forward`` takes images [N, in_channels, H, W] and gives the output of the last norm, [N, C, H', W'].
    """

    def forward(self, input: Tensor) -> Tensor:
        return run_features(list(self), input)  # children() gives a module that comes twice once

    def pooled(self, x: Tensor) -> Tensor:
        """relu(forward(x)) averaged over each image, [N, C]; the last norm joins the last block's stage."""
        is_own = type(self).forward is Features.forward and not fusion.is_observed(self)
        whole = is_own and not fusion.any_global_hook()
        out, is_pooled = run_children(list(self), x, with_head=True) if whole else (self(x), False)
        return out if is_pooled else global_average(out, self._spatial_dims())

    def _spatial_dims(self) -> int:
        """Those of the convolutions: what torch.fx traces in the place of a tensor does not tell."""
        return next((dims_of(module) for module in self.modules() if isinstance(module, Convolution)), 2)


def run_named_children(
    children: Mapping[str, nn.Module | None], wanted: Container[str], x: Tensor
) -> dict[str, Tensor]:
    """Runs a sequence, as many children as one operator takes at a time; the outputs of those ``wanted``, by name.

    The stem's inner outputs are computed where one of them is wanted.
    """
    outputs: dict[str, Tensor] = {}
    later: list[Update] = []
    remaining = list(cast(Mapping[str, nn.Module], children).items())
    while remaining:
        results = _run_some(remaining, wanted, x, later)
        for (name, _), x in zip(remaining, results, strict=False):
            if name in wanted:
                outputs[name] = x
        remaining = remaining[len(results) :]
    update_running_statistics(later)
    return outputs


def _run_some(
    remaining: list[tuple[str, nn.Module]], wanted: Container[str], x: Tensor, later: list[Update]
) -> list[Tensor]:
    """The outputs of as many children as one operator takes; what lies inside a stem repeats its input."""
    names, modules = [name for name, _ in remaining], [module for _, module in remaining]
    if fusion.tracer(x, modules[0].training):
        return [_run_alone(modules[0], x, later)]
    stage = take_stage(modules, with_head=False)
    if stage is not None:
        out, features = run_stage(*stage, x, later=later)
        return [features, out]
    stem = fusion.take_stem(modules)
    inside = len(modules) - len(stem[2]) - 1 if stem is not None else 0
    if stem is None or any(name in wanted for name in names[:inside]):
        return [_run_alone(modules[0], x, later)]
    return [x] * inside + [run_stem(stem[0], stem[1], x, saves_conv(modules), later)]


def run_children(children: list[nn.Module], x: Tensor, with_head: bool) -> tuple[Tensor, bool]:
    """Runs a sequence, as many children as one operator takes at a time.

    ``with_head``: a last norm joins the last block, and what follows is known to be ReLU, average pooling and a
    classifier.
    Returns the output, and whether it is [N, C], pooled already. The running statistics of stems and stages are updated
    behind the last child: images that a later one refuses change none.
    """
    later: list[Update] = []
    output = _run_children(children, x, with_head, later)
    update_running_statistics(later)
    return output


def run_features(children: list[nn.Module], x: Tensor) -> Tensor:
    """The output of a sequence; what its last norm makes is contiguous where ``x`` is, for users call `view` on it."""
    output = run_children(children, x, with_head=False)[0]
    if not children or fusion.tracer(x, children[-1].training) or not fusion.is_last_norm(children[-1]):
        return output  # a tracer first: of torch.fx it would see that the norm's weight is read
    return output.contiguous() if x.is_contiguous() else output


def _run_children(children: list[nn.Module], x: Tensor, with_head: bool, later: list[Update]) -> tuple[Tensor, bool]:
    is_within_network = with_head
    while children:
        prepared = _kept_stage(children, with_head, x)
        if prepared is not None:
            x, children = run_prepared(prepared, x, keep_features=False)[0], children[2:]
            if prepared.exit.kind == HEAD:
                return x, True
            continue
        traced = fusion.tracer(x, children[0].training)
        stem, stage = (None, None) if traced else (fusion.take_stem(children), take_stage(children, with_head))
        if stem is not None:
            conv, norm, rest = stem
            x, children = run_stem(conv, norm, x, saves_conv(children), later), rest
        elif stage is not None:
            is_within_network = is_within_network and x.requires_grad  # else it ends behind what is frozen
            x, _ = run_stage(*stage, x, False, is_within_network, later)
            children = children[2:]
            if stage[2].kind == HEAD:
                return x, True
        else:
            x, children = _run_alone(children[0], x, later), children[1:]
    return x, False


def _run_alone(module: nn.Module, x: Tensor, later: list[Update]) -> Tensor:
    """The output of ``module`` by its own forward, which updates its running statistics at once.

    Where it shares some with what came before, as a block that comes twice does, those updates come first.
    """
    if later:
        own = set(map(id, module.buffers()))
        if any(id(norm._buffers.get("running_mean")) in own for norm, _ in later):
            update_running_statistics(later)
            later.clear()
    output: Tensor = module(x)
    return output


def _kept_stage(children: list[nn.Module], with_head: bool, x: Tensor) -> inference.PreparedStage | None:
    """What an inference has prepared for the block that comes first and its consumer, where nothing has changed."""
    if len(children) < 2 or not isinstance(children[0], StageBlock) or not inference.applies(x):
        return None
    prepared = inference.kept_stage(*children[:2])
    is_head = prepared is not None and prepared.exit.kind == HEAD
    return prepared if not is_head or (with_head and len(children) == 2) else None


def run_block(block: StageBlock, consumer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """The outputs of ``consumer``, which reads that of ``block``, and of ``block``; by one operator where possible."""
    stage = None if fusion.tracer(x, block.training) else take_stage([block, consumer], with_head=False)
    if stage is not None:
        return run_stage(*stage, x)
    features = block(x)
    return consumer(features), features


def take_stage(children: list[nn.Module], with_head: bool) -> tuple[StageBlock, list[LayerParts], StageExit] | None:
    """A dense block that comes first, with its layers and what consumes it and may join it as its exit."""
    if len(children) < 2:
        return None
    block, consumer = children[:2]
    if not isinstance(block, StageBlock) or type(block).forward is not StageBlock.forward or fusion.is_observed(block):
        return None
    head = fusion.read_head(consumer) if with_head and len(children) == 2 else None
    stage_exit = head or fusion.read_transition(consumer)
    if stage_exit is None or stage_exit.norm is None:
        return None
    layers = read_once(block)
    if isinstance(layers, str) or not is_for(stage_exit.norm, layers[0].spatial_dims):
        return None
    if stage_exit.norm.num_features != fusion.channels_behind(layers):
        return None
    if stage_exit.dropout not in (None, layers[0].dropout):
        return None
    return block, layers, stage_exit


def saves_conv(children: list[nn.Module]) -> bool:
    """The stem follows the level of the first block."""
    block = next((child for child in children if isinstance(child, StageBlock)), None)
    return block is not None and block.checkpointing == "none"
