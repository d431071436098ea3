"""The naive DenseNet in plain torch operations: the oracle of the tests and the baseline of the benchmarks.

Every layer concatenates, normalises and convolves with stock modules, and autograd keeps whatever it wants.
With the same weights it equals torchvision's `DenseNet` bit for bit. Nothing is optimised; nothing should be.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _kind(name: str, spatial_dims: int) -> Any:
    """torch's class of this name for so many dimensions."""
    return getattr(nn, f"{name}{spatial_dims}d")


class NaiveDenseLayer(nn.Sequential):
    """BN-ReLU-conv1x1-BN-ReLU-conv3x3, or BN-ReLU-conv3x3 without bottleneck; then dropout.

    Maps the block's features so far, `[N, in_channels, H, W]`, to `[N, growth_rate, H, W]` new ones.
    """

    def __init__(
        self,
        in_channels: int,
        growth_rate: int,
        bn_size: int,
        drop_rate: float,
        bottleneck: bool,
        spatial_dims: int = 2,
        kernel_size: int = 3,
        dilation: int = 1,
    ) -> None:
        super().__init__()
        self.drop_rate = drop_rate
        width = bn_size * growth_rate
        norm, convolution = _kind("BatchNorm", spatial_dims), _kind("Conv", spatial_dims)
        last: dict[str, Any] = {"padding": dilation * (kernel_size // 2), "dilation": dilation, "bias": False}
        self.norm1 = norm(in_channels)
        self.relu1 = nn.ReLU(inplace=True)
        if bottleneck:
            self.conv1 = convolution(in_channels, width, kernel_size=1, bias=False)
            self.norm2 = norm(width)
            self.relu2 = nn.ReLU(inplace=True)
            self.conv2 = convolution(width, growth_rate, kernel_size, **last)
        else:
            self.conv1 = convolution(in_channels, growth_rate, kernel_size, **last)

    def forward(self, features: Tensor) -> Tensor:
        new_features = super().forward(features)
        if self.drop_rate > 0:
            new_features = F.dropout(new_features, p=self.drop_rate, training=self.training)
        return new_features


class NaiveDenseBlock(nn.ModuleDict):
    """Dense layers, each fed the concatenation of the block's input and of all layers before it."""

    def __init__(
        self,
        num_layers: int,
        in_channels: int,
        growth_rate: int,
        bn_size: int,
        drop_rate: float,
        bottleneck: bool,
        spatial_dims: int = 2,
        kernel_size: int = 3,
        dilations: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        for i, dilation in enumerate(dilations or [1] * num_layers):
            channels = in_channels + i * growth_rate
            self[f"denselayer{i + 1}"] = NaiveDenseLayer(
                channels, growth_rate, bn_size, drop_rate, bottleneck, spatial_dims, kernel_size, dilation
            )

    def forward(self, features: Tensor) -> Tensor:
        for layer in self.values():
            features = torch.cat((features, layer(features)), dim=1)
        return features


class NaiveTransition(nn.Sequential):
    """BN-ReLU-conv1x1-average pooling: `[N, in_channels, H, W]` to `[N, out_channels, H // 2, W // 2]`."""

    def __init__(self, in_channels: int, out_channels: int, spatial_dims: int = 2) -> None:
        super().__init__()
        self.norm = _kind("BatchNorm", spatial_dims)(in_channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv = _kind("Conv", spatial_dims)(in_channels, out_channels, kernel_size=1, bias=False)
        self.pool = _kind("AvgPool", spatial_dims)(kernel_size=2, stride=2)


class NaiveDenseNet(nn.Module):
    """DenseNet (Huang et al., https://arxiv.org/abs/1608.06993) as anyone would write it.

    The arguments, the names in the state_dict and the random stream of the initialisation are those of
    `EfficientDenseNet` and of torchvision; `memory_efficient` and `checkpointing` are accepted and ignored.
    Maps images `[N, in_channels, H, W]` (or of `spatial_dims` 1 or 3) to logits `[N, num_classes]`.
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
        checkpointing: str | None = None,
        spatial_dims: int = 2,
    ) -> None:
        super().__init__()
        norm, convolution = _kind("BatchNorm", spatial_dims), _kind("Conv", spatial_dims)
        self.features = nn.Sequential()
        if small_inputs:
            self.features.conv0 = convolution(in_channels, num_init_features, kernel_size=3, padding=1, bias=False)
        else:
            self.features.conv0 = convolution(
                in_channels, num_init_features, kernel_size=7, stride=2, padding=3, bias=False
            )
            self.features.norm0 = norm(num_init_features)
            self.features.relu0 = nn.ReLU(inplace=True)
            self.features.pool0 = _kind("MaxPool", spatial_dims)(kernel_size=3, stride=2, padding=1)

        channels = num_init_features
        for i, num_layers in enumerate(block_config, start=1):
            block = NaiveDenseBlock(num_layers, channels, growth_rate, bn_size, drop_rate, bottleneck, spatial_dims)
            self.features.add_module(f"denseblock{i}", block)
            channels += num_layers * growth_rate
            if i < len(block_config):
                compressed = int(channels * compression)
                self.features.add_module(f"transition{i}", NaiveTransition(channels, compressed, spatial_dims))
                channels = compressed
        self.features.norm5 = norm(channels)
        self.classifier = nn.Linear(channels, num_classes)

        for module in self.modules():
            if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
                nn.init.kaiming_normal_(module.weight)
            elif isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
                module.eps = norm_eps

    def forward(self, images: Tensor) -> Tensor:
        features = F.relu(self.features(images), inplace=True)
        return self.classifier(features.flatten(2).mean(2))


class NaiveTransitionDown(nn.Sequential):
    """BN-ReLU-conv1x1-dropout-maximum pooling: `[N, channels, H, W]` to `[N, channels, H // 2, W // 2]`."""

    def __init__(self, channels: int, drop_rate: float) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv = nn.Conv2d(channels, channels, kernel_size=1, bias=False)
        self.drop = nn.Dropout(drop_rate)
        self.pool = nn.MaxPool2d(kernel_size=2)


class NaiveTransitionUp(nn.Module):
    """A transposed convolution that doubles the size, cropped to the skip connection and concatenated with it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.ConvTranspose2d(channels, channels, kernel_size=3, stride=2, bias=False)

    def forward(self, new_features: Tensor, skip: Tensor) -> Tensor:
        up = self.conv(new_features)[:, :, : skip.shape[2], : skip.shape[3]]
        return torch.cat((up, skip), dim=1)


class NaiveFCDenseNet(nn.Module):
    """FC-DenseNet (Jégou et al., https://arxiv.org/abs/1611.09326) as anyone would write it.

    The arguments, the names in the state_dict and the random stream of the initialisation are those of
    `segmentation.FCDenseNet`. Maps images `[N, in_channels, H, W]` to logits `[N, num_classes, H, W]`.
    """

    def __init__(
        self,
        growth_rate: int = 16,
        block_config: Sequence[int] = (4, 5, 7, 10, 12, 15),
        num_init_features: int = 48,
        drop_rate: float = 0.2,
        num_classes: int = 11,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        added = [num_layers * growth_rate for num_layers in block_config]
        totals = [num_init_features + sum(added[: i + 1]) for i in range(len(added))]

        def block(num_layers: int, channels: int) -> NaiveDenseBlock:
            return NaiveDenseBlock(num_layers, channels, growth_rate, 1, drop_rate, bottleneck=False)

        self.conv0 = nn.Conv2d(in_channels, num_init_features, kernel_size=3, padding=1, bias=False)
        self.down_blocks, self.transitions_down = nn.ModuleList(), nn.ModuleList()
        for i, num_layers in enumerate(block_config[:-1]):
            self.down_blocks.append(block(num_layers, totals[i] - added[i]))
            self.transitions_down.append(NaiveTransitionDown(totals[i], drop_rate))
        self.coarsest_block = block(block_config[-1], totals[-1] - added[-1])
        self.transitions_up, self.up_blocks = nn.ModuleList(), nn.ModuleList()
        for i in reversed(range(len(block_config) - 1)):
            self.transitions_up.append(NaiveTransitionUp(added[i + 1]))
            self.up_blocks.append(block(block_config[i], added[i + 1] + totals[i]))
        last = totals[0] + sum(added[:2])
        self.classifier = nn.Conv2d(last, num_classes, kernel_size=1)

        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                nn.init.kaiming_uniform_(module.weight, nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        features = self.conv0(images)
        skips = []
        for block, transition in zip(self.down_blocks, self.transitions_down, strict=True):
            skips.append(block(features))
            features = transition(skips[-1])
        channels = features.shape[1]
        features = self.coarsest_block(features)
        for transition, block in zip(self.transitions_up, self.up_blocks, strict=True):
            features = transition(features[:, channels:], skips.pop())
            channels = features.shape[1]
            features = block(features)
        return self.classifier(features)
