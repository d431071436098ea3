"""The topology: EfficientDenseNet, its ImageNet presets, and the CIFAR networks of the paper (arXiv:1608.06993)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Container, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from . import inference
from .argument_checks import (
    check_drop_rate,
    check_flag,
    check_layers,
    check_number,
    check_positive,
    check_spatial_dims,
    levels_of,
)
from .dimensions import BATCH_NORMS, CONVOLUTIONS, MAX_POOLS, BatchNorm, Convolution, global_average
from .modules import DenseBlock, Features, Transition
from .planning import MemoryPlan, plan
from .planning.free_bottlenecks import find_free_bottlenecks
from .planning.shapes import blocks_of
from .weights import PretrainedNetwork
from .weights.checkpoints import own_name


class EfficientDenseNet(PretrainedNetwork):
    """DenseNet (Huang et al., CVPR 2017, arXiv:1608.06993) that keeps almost no activations for its backward.

    Constructor arguments, attribute names and state_dict keys are those of ``torchvision.models.DenseNet``; what stands
    after ``memory_efficient`` is added. Input: float [N, in_channels, H, W] of any layout, or [N, in_channels,
    L] with ``spatial_dims=1``, or [N, in_channels, D, H, W] with 3; output: [N, num_classes].

    Args:
        growth_rate: k, the channels that each layer adds.
        block_config: the number of layers of each block; a transition stands between two blocks.
        num_init_features: the channels of the first convolution.
        bn_size: the bottleneck's channels are ``bn_size * growth_rate``.
        drop_rate: of the dropout after each layer, in [0, 1).
        num_classes: outputs of the classifier.
        memory_efficient: torchvision's flag, on by default: True means ``checkpointing="bottleneck"``, False "none".
        in_channels: channels of the input.
        compression: theta, a transition gives ``int(channels * compression)`` channels; 0.5 in -C and -BC, 1.0 without.
        bottleneck: whether a layer has its 1x1 convolution (-B and -BC).
        small_inputs: the stem of the CIFAR networks, one 3x3 convolution without pooling.
        norm_eps: epsilon of the batch norms; weights of Keras bring their own.
        checkpointing: "none" saves the bottleneck outputs for the backward, "bottleneck" recomputes them, but for those
            that raise no peak; one level for all blocks, or a sequence of one per block. The stem follows the first.
        spatial_dims: 1 for signals, 2 for images, 3 for volumes.

    Raises:
        TypeError, ValueError: an argument is of another type or outside its range.
    """

    def __init__(
        self,
        growth_rate: int = 32,
        block_config: Sequence[int] = (6, 12, 24, 16),
        num_init_features: int = 64,
        bn_size: int = 4,
        drop_rate: float = 0.0,
        num_classes: int = 1000,
        memory_efficient: bool = True,
        *,
        in_channels: int = 3,
        compression: float = 0.5,
        bottleneck: bool = True,
        small_inputs: bool = False,
        norm_eps: float = 1e-5,
        checkpointing: str | Sequence[str] | None = None,
        spatial_dims: int = 2,
    ) -> None:
        super().__init__()
        level = ("bottleneck" if memory_efficient else "none") if checkpointing is None else checkpointing
        self.config = {
            "growth_rate": growth_rate,
            "block_config": list(block_config) if isinstance(block_config, list | tuple) else block_config,
            "num_init_features": num_init_features,
            "bn_size": bn_size,
            "drop_rate": drop_rate,
            "num_classes": num_classes,
            "in_channels": in_channels,
            "compression": compression,
            "bottleneck": bottleneck,
            "small_inputs": small_inputs,
            "norm_eps": norm_eps,
            "checkpointing": list(level) if isinstance(level, list | tuple) else level,
            "spatial_dims": spatial_dims,
        }
        _check_config(self.config)
        levels = levels_of(level, len(block_config))
        self.features = Features()
        _add_stem(self.features, in_channels, num_init_features, small_inputs, spatial_dims)
        channels = _add_blocks(self.features, self.config, levels)
        self.features.add_module("norm5", BATCH_NORMS[spatial_dims](channels))
        self.classifier = nn.Linear(channels, num_classes)
        self._initialise()
        self._find_free_bottlenecks()

    def _find_free_bottlenecks(self) -> None:
        find_free_bottlenecks([child for child in self.features._modules.values() if child is not None])

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, Convolution):
                if not module.weight.is_meta:  # there it would do nothing but import the compiler
                    nn.init.kaiming_normal_(module.weight)
            elif isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
            elif isinstance(module, BatchNorm):
                module.eps = self.config["norm_eps"]

    @property
    def checkpointing(self) -> str | list[str]:
        """The level of all blocks, or the list of each block's; assign either at any time.

        The levels are "none" and "bottleneck"; the stem follows the first block.
        """
        value: str | list[str] = self.config["checkpointing"]
        return value if isinstance(value, str) else list(value)

    @checkpointing.setter
    def checkpointing(self, value: str | Sequence[str]) -> None:
        levels = levels_of(value, len(self.config["block_config"]))
        self.config["checkpointing"] = levels[0] if len(set(levels)) == 1 else levels
        for index, level in enumerate(levels, start=1):
            block = self.features._modules.get(f"denseblock{index}")
            if isinstance(block, DenseBlock):
                block.checkpointing = level
        self._find_free_bottlenecks()

    def set_memory_budget(
        self,
        budget: int | str,
        input_shape: Sequence[int],
        dtype: torch.dtype | str = torch.float32,
        *,
        batch: int | None = None,
        optimizer: str = "adamw",
        offload: bool = False,
    ) -> MemoryPlan:
        """Sets the levels of checkpointing that `plan` finds cheapest for a training step within ``budget``, and the
        blocks whose storages wait in the host's memory.

        The arguments are those of `densenet_efficient.plan`, whose answer is returned.

        Raises:
            ValueError: no levels fit; the model stays as it was.
        """
        found = plan(self, input_shape, dtype, batch=batch, budget=budget, optimizer=optimizer, offload=offload)
        found.check_fits()
        for block, is_offloaded in zip(blocks_of(self), found.offloaded, strict=True):
            block.offload = is_offloaded
        self.checkpointing = found.checkpointing
        return found

    @property
    def depth(self) -> int:
        """The number in a DenseNet's name: its convolutions plus the classifier."""
        return 1 + sum(isinstance(module, Convolution) for module in self.modules())

    def forward(self, x: Tensor) -> Tensor:
        return inference.classify(self.classifier, self._pooled(x))

    def forward_of_frozen_features(self, x: Tensor) -> Tensor:
        """``forward`` for training the classifier alone: of the features nothing is kept for the backward."""
        with torch.no_grad():
            pooled = self._pooled(x)
        logits: Tensor = self.classifier(pooled)
        return logits

    def _pooled(self, x: Tensor) -> Tensor:
        features, dims = self.features, self.config["spatial_dims"]  # features that a user may have replaced
        return features.pooled(x) if isinstance(features, Features) else global_average(features(x), dims)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Accepts the keys of older checkpoints and of other libraries too: see `weights.checkpoints.own_name`."""
        rename_old_keys(state_dict, prefix, own={*self._modules, *self._parameters, *self._buffers})
        super()._load_from_state_dict(state_dict, prefix, *args)


def rename_old_keys(state_dict: dict[str, Any], prefix: str = "", own: Container[str] = ()) -> None:
    """Renames, in place, "denselayer1.norm.1." to "denselayer1.norm1.", "module.features" to "features", and others."""
    for key in list(state_dict):
        if not key.startswith(prefix):
            continue
        name = own_name(key[len(prefix) :], own)
        if prefix + name not in state_dict:  # with both, loading refuses the one that it does not know
            state_dict[prefix + name] = state_dict.pop(key)


def _add_stem(features: nn.Sequential, in_channels: int, channels: int, small_inputs: bool, spatial_dims: int) -> None:
    convolution = CONVOLUTIONS[spatial_dims]
    if small_inputs:
        features.add_module("conv0", convolution(in_channels, channels, kernel_size=3, padding=1, bias=False))
        return
    features.add_module("conv0", convolution(in_channels, channels, kernel_size=7, stride=2, padding=3, bias=False))
    features.add_module("norm0", BATCH_NORMS[spatial_dims](channels))
    features.add_module("relu0", nn.ReLU(inplace=True))
    features.add_module("pool0", MAX_POOLS[spatial_dims](kernel_size=3, stride=2, padding=1))


def _add_blocks(features: nn.Sequential, config: dict[str, Any], levels: list[str]) -> int:
    """The dense blocks, each at its level, with a transition between two; the channels that the last one gives."""
    channels, compression, dims = config["num_init_features"], config["compression"], config["spatial_dims"]
    shared = {name: config[name] for name in ("bn_size", "growth_rate", "drop_rate", "bottleneck", "spatial_dims")}
    for index, (num_layers, level) in enumerate(zip(config["block_config"], levels, strict=True), start=1):
        block = DenseBlock(num_layers, channels, checkpointing=level, **shared)
        features.add_module(f"denseblock{index}", block)
        channels = block.num_output_features
        if index < len(levels):
            compressed = int(channels * compression)
            if compressed < 1:
                raise ValueError(f"compression {compression} leaves none of {channels} channels; give a larger one")
            features.add_module(f"transition{index}", Transition(channels, compressed, dims))
            channels = compressed
    return channels


def _check_config(config: dict[str, Any]) -> None:
    for name in ("growth_rate", "num_init_features", "bn_size", "num_classes", "in_channels"):
        check_positive(name, config[name])
    check_layers(config["block_config"])
    check_drop_rate(config["drop_rate"])
    check_number("compression", config["compression"])
    check_number("norm_eps", config["norm_eps"])
    if not 0 < config["compression"] <= 1:
        raise ValueError(f"compression must be in (0, 1], got {config['compression']}")
    if not config["norm_eps"] > 0:
        raise ValueError(f"norm_eps must be above 0, got {config['norm_eps']}")
    check_spatial_dims(config["spatial_dims"])
    for name in ("bottleneck", "small_inputs"):
        check_flag(name, config[name])


class _ImageNetDenseNet(EfficientDenseNet):
    """A network of the paper's table 1, with the arguments of torchvision's function of its name."""

    layout: ClassVar[tuple[int, tuple[int, ...], int]]  # growth_rate, block_config, num_init_features

    def __init__(
        self, *, weights: Any = None, progress: bool = True, pretrained: bool | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*self.layout, **kwargs)
        self.load_torchvision(weights if pretrained is None else _former_choice(weights, pretrained), progress)


def _former_choice(weights: Any, pretrained: bool) -> str | None:
    """The ``weights`` that ``pretrained`` means: torchvision takes it still, and warns."""
    if weights is not None:
        raise TypeError("pretrained is the former name of weights; give one of them")
    warnings.warn("pretrained is deprecated; give weights='IMAGENET1K_V1', or None", stacklevel=3)
    return "IMAGENET1K_V1" if pretrained else None


class EfficientDenseNet121(_ImageNetDenseNet):
    """DenseNet-121: blocks 6, 12, 24, 16, growth rate 32; 8.0 M parameters."""

    architecture = "densenet121"
    layout = 32, (6, 12, 24, 16), 64


class EfficientDenseNet161(_ImageNetDenseNet):
    """DenseNet-161: blocks 6, 12, 36, 24, growth rate 48; 28.7 M parameters."""

    architecture = "densenet161"
    layout = 48, (6, 12, 36, 24), 96


class EfficientDenseNet169(_ImageNetDenseNet):
    """DenseNet-169: blocks 6, 12, 32, 32, growth rate 32; 14.1 M parameters."""

    architecture = "densenet169"
    layout = 32, (6, 12, 32, 32), 64


class EfficientDenseNet201(_ImageNetDenseNet):
    """DenseNet-201: blocks 6, 12, 48, 32, growth rate 32; 20.0 M parameters."""

    architecture = "densenet201"
    layout = 32, (6, 12, 48, 32), 64


class EfficientDenseNet264(_ImageNetDenseNet):
    """DenseNet-264: blocks 6, 12, 64, 48, growth rate 32; 33.3 M parameters.

    The paper's name counts one less than the rule that gives 121, 161, 169 and 201: `depth` is 265.
    """

    architecture = "densenet264"
    layout = 32, (6, 12, 64, 48), 64


def cifar_densenet(
    depth: int, growth_rate: int, bottleneck: bool = True, compression: float = 0.5, **kwargs: Any
) -> EfficientDenseNet:
    """A network of the paper's CIFAR and SVHN experiments (section 4.2): three blocks on 32x32 images, 10 classes.

    Plain: ``bottleneck=False, compression=1.0``; -B: ``compression=1.0``; -C: ``bottleneck=False``; -BC: the defaults.

    Args:
        depth: convolutions plus the classifier; ``depth - 4`` must be divisible by 3, by 6 with the bottleneck.
        growth_rate: k.
        kwargs: further arguments of `EfficientDenseNet`.

    Raises:
        ValueError: no such network has this depth.
    """
    convolutions = 6 if bottleneck else 3
    if depth <= 4 or (depth - 4) % convolutions:
        raise ValueError(f"depth must be 4 plus a multiple of {convolutions}, got {depth}")
    num_layers = (depth - 4) // convolutions
    num_init_features = 2 * growth_rate if bottleneck and compression < 1 else 16
    settings: dict[str, Any] = {"num_classes": 10, "small_inputs": True, "num_init_features": num_init_features}
    return EfficientDenseNet(
        growth_rate, (num_layers,) * 3, bottleneck=bottleneck, compression=compression, **(settings | kwargs)
    )


def _cifar(depth: int, growth_rate: int, bottleneck: bool, compression: float) -> Callable[..., EfficientDenseNet]:
    return lambda **kwargs: cifar_densenet(depth, growth_rate, bottleneck, compression, **kwargs)


_MODELS: dict[str, Callable[..., EfficientDenseNet]] = {
    "densenet121": EfficientDenseNet121,
    "densenet161": EfficientDenseNet161,
    "densenet169": EfficientDenseNet169,
    "densenet201": EfficientDenseNet201,
    "densenet264": EfficientDenseNet264,
    "densenet-40-12": _cifar(40, 12, bottleneck=False, compression=1.0),
    "densenet-100-12": _cifar(100, 12, bottleneck=False, compression=1.0),
    "densenet-100-24": _cifar(100, 24, bottleneck=False, compression=1.0),
    "densenet-b-100-12": _cifar(100, 12, bottleneck=True, compression=1.0),
    "densenet-c-100-12": _cifar(100, 12, bottleneck=False, compression=0.5),
    "densenet-bc-40-12": _cifar(40, 12, bottleneck=True, compression=0.5),  # not in the paper: for the smallest images
    "densenet-bc-100-12": _cifar(100, 12, bottleneck=True, compression=0.5),
    "densenet-bc-250-24": _cifar(250, 24, bottleneck=True, compression=0.5),
    "densenet-bc-190-40": _cifar(190, 40, bottleneck=True, compression=0.5),
}


def model_names() -> list[str]:
    """The names that `create_model` knows."""
    return list(_MODELS)


def create_model(name: str, **kwargs: Any) -> EfficientDenseNet:
    """The network of this name; ``kwargs`` are further arguments of `EfficientDenseNet`.

    Raises:
        ValueError: there is no network of this name.
    """
    if name not in _MODELS:
        raise ValueError(f"unknown model {name!r}; expected one of {', '.join(model_names())}")
    return _MODELS[name](**kwargs)
