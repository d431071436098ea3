"""FC-DenseNets, the One Hundred Layers Tiramisu (Jégou et al. 2017, arXiv:1611.09326), for semantic segmentation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from .argument_checks import check_layers, check_positive
from .dropout import Dropout
from .modules import DenseBlock, run_block
from .operator_calls import StageBlock


class TransitionDown(nn.Sequential):
    """BN-ReLU-conv1x1-dropout-2x2 maximum pooling: [N, C, H, W] to [N, C, H // 2, W // 2]."""

    def __init__(self, num_features: int, drop_rate: float) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(num_features)
        self.relu = nn.ReLU(inplace=True)
        self.conv = nn.Conv2d(num_features, num_features, kernel_size=1, bias=False)
        self.drop = Dropout(drop_rate)
        self.pool = nn.MaxPool2d(kernel_size=2)


class TransitionUp(nn.Module):
    """3x3 transposed convolution of stride 2, cropped to the skip connection and concatenated with it."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.conv = nn.ConvTranspose2d(num_features, num_features, kernel_size=3, stride=2, bias=False)

    def forward(self, new_features: Tensor, skip: Tensor) -> Tensor:
        """[N, C + C', H', W'] from the features that a block added, [N, C, H, W], and a skip [N, C', H', W'].

        ``H'`` is 2H or 2H + 1, and the convolution gives 2H + 1 rows: a last one too many is cut off.
        """
        up = self.conv(new_features)
        return torch.cat([up[:, :, : skip.shape[2], : skip.shape[3]], skip], 1)


class FCDenseNet(nn.Module):
    """A fully convolutional DenseNet that keeps almost no activations for its backward.

    Dense blocks of layers without bottleneck (BN-ReLU-conv3x3-dropout) go down to the coarsest resolution and up again;
    upwards, only what the block before added is upsampled. No convolution has a bias but the last: a batch norm follows
    the others.

    Input: float [N, in_channels, H, W], H and W of at least ``2 ** (len(block_config) - 1)`` pixels and otherwise
    arbitrary; output: one logit per class and pixel, [N, num_classes, H, W].

    Args:
        growth_rate: k, the channels that each layer adds.
        block_config: the number of layers of each block downwards; the last block is the coarsest, and the others come
            again upwards in reverse order.
        num_init_features: the channels of the first convolution.
        drop_rate: of the dropout after each 3x3 convolution and in each transition down, in [0, 1).
        num_classes: outputs per pixel; the paper's CamVid has 11.
        in_channels: channels of the input.

    Raises:
        TypeError, ValueError: an argument is of another type or outside its range.
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
        for name, value in (
            ("growth_rate", growth_rate),
            ("num_init_features", num_init_features),
            ("num_classes", num_classes),
            ("in_channels", in_channels),
        ):
            check_positive(name, value)
        check_layers(block_config)
        *down, coarsest = block_config
        channels = num_init_features
        skips = []
        self.conv0 = nn.Conv2d(in_channels, channels, kernel_size=3, padding=1, bias=False)
        self.down_blocks, self.transitions_down = nn.ModuleList(), nn.ModuleList()
        for num_layers in down:
            self.down_blocks.append(_block(num_layers, channels, growth_rate, drop_rate))
            channels += num_layers * growth_rate
            skips.append(channels)
            self.transitions_down.append(TransitionDown(channels, drop_rate))
        self.coarsest_block = _block(coarsest, channels, growth_rate, drop_rate)
        channels += coarsest * growth_rate
        self.transitions_up, self.up_blocks = nn.ModuleList(), nn.ModuleList()
        added = coarsest * growth_rate
        for num_layers, skip in zip(reversed(down), reversed(skips), strict=True):
            self.transitions_up.append(TransitionUp(added))
            self.up_blocks.append(_block(num_layers, added + skip, growth_rate, drop_rate))
            channels, added = added + skip + num_layers * growth_rate, num_layers * growth_rate
        self.classifier = nn.Conv2d(channels, num_classes, kernel_size=1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                nn.init.kaiming_uniform_(module.weight, nonlinearity="relu")  # HeUniform, as in the paper

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv0(x)
        skips = []
        for block, transition in zip(self.down_blocks, self.transitions_down, strict=True):
            x, features = run_block(cast(StageBlock, block), transition, x)
            skips.append(features)
        features, channels = self.coarsest_block(x), x.shape[1]
        for transition, block in zip(self.transitions_up, self.up_blocks, strict=True):
            x = transition(features[:, channels:], skips.pop())
            features, channels = block(x), x.shape[1]
        logits: Tensor = self.classifier(features)
        return logits


def _block(num_layers: int, channels: int, growth_rate: int, drop_rate: float) -> DenseBlock:
    return DenseBlock(num_layers, channels, 1, growth_rate, drop_rate, bottleneck=False)


class FCDenseNet56(FCDenseNet):
    """FC-DenseNet56: 4 layers in each of 11 blocks, growth rate 12; 1.4 M parameters (the paper prints 1.5 M)."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(12, (4,) * 6, **kwargs)


class FCDenseNet67(FCDenseNet):
    """FC-DenseNet67: 5 layers in each of 11 blocks, growth rate 16; 3.5 M parameters."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(16, (5,) * 6, **kwargs)


class FCDenseNet103(FCDenseNet):
    """FC-DenseNet103: blocks of 4, 5, 7, 10, 12, 15 layers, and back; growth rate 16; 9.4 M parameters."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(16, (4, 5, 7, 10, 12, 15), **kwargs)
