"""DenseNets as people write them after torchvision's: in three dimensions, with other forwards, and almost one."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
MAX_POOLS = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}
AVG_POOLS = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}


class _DenseLayer(nn.Sequential):
    """A layer that gives all its input back with its own features, as 3D-ResNets has it."""

    def __init__(self, dims, channels, growth_rate, bn_size, drop_rate):
        super().__init__()
        width = bn_size * growth_rate
        self.add_module("norm1", NORMS[dims](channels))
        self.add_module("relu1", nn.ReLU(inplace=True))
        self.add_module("conv1", CONVOLUTIONS[dims](channels, width, kernel_size=1, stride=1, bias=False))
        self.add_module("norm2", NORMS[dims](width))
        self.add_module("relu2", nn.ReLU(inplace=True))
        self.add_module("conv2", CONVOLUTIONS[dims](width, growth_rate, 3, stride=1, padding=1, bias=False))
        self.drop_rate = drop_rate

    def forward(self, x):
        new_features = super().forward(x)
        if self.drop_rate > 0:
            new_features = F.dropout(new_features, p=self.drop_rate, training=self.training)
        return torch.cat([x, new_features], 1)


class _DenseBlock(nn.Sequential):
    layer = _DenseLayer

    def __init__(self, dims, layers, channels, growth_rate, bn_size, drop_rate):
        super().__init__()
        for index in range(layers):
            layer = self.layer(dims, channels + index * growth_rate, growth_rate, bn_size, drop_rate)
            self.add_module(f"denselayer{index + 1}", layer)


class ListLayer(_DenseLayer):
    """A layer that takes all features apart and checkpoints, as Pleiss et al.'s has it."""

    def forward(self, *features):
        def bottleneck(*inputs):
            return self.conv1(self.relu1(self.norm1(torch.cat(inputs, 1))))

        out = checkpoint(bottleneck, *features, use_reentrant=False)
        return F.dropout(self.conv2(self.relu2(self.norm2(out))), self.drop_rate, self.training)


class ListBlock(_DenseBlock):
    layer = ListLayer

    def forward(self, x):
        features = [x]
        for layer in self.children():
            features.append(layer(*features))
        return torch.cat(features, 1)


class AdaptableLayer(_DenseLayer):
    """A dense layer as long as its further parts are what they are at first."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.adapter, self.share = nn.Identity(), 1.0

    def forward(self, x):
        out = self.conv2(self.relu2(self.norm2(self.conv1(self.relu1(self.norm1(x))))))
        return torch.cat([x, self.share * self.adapter(out)], 1)


class AdaptableBlock(_DenseBlock):
    layer = AdaptableLayer


class ResidualLayer(_DenseLayer):
    """No dense layer: it scales what it adds, which its modules' names do not say."""

    def forward(self, x):
        return torch.cat([x, 0.2 * nn.Sequential.forward(self, x)], 1)


class ResidualBlock(_DenseBlock):
    layer = ResidualLayer


class LateLayer(_DenseLayer):
    """Another layer in training than in evaluation."""

    def forward(self, x):
        return super().forward(x) * (1 if not self.training else 2)


class LateBlock(_DenseBlock):
    layer = LateLayer


class EvaluationLayer(_DenseLayer):
    """Another layer in evaluation than in training."""

    def forward(self, x):
        return super().forward(x) * (1 if self.training else 2)


class EvaluationBlock(_DenseBlock):
    layer = EvaluationLayer


class FailingBlock(_DenseBlock):
    def forward(self, x, *, mask):
        return super().forward(x) * mask


class TupleBlock(_DenseBlock):
    def forward(self, x):
        return (super().forward(x),)


class HandwrittenDenseNet(nn.Module):
    """A video DenseNet as 3D-ResNets', whose stem does not halve the time; or of other dimensions."""

    def __init__(
        self, dims=3, block=_DenseBlock, drop_rate=0.0, growth_rate=4, block_config=(3, 2), features=6, bn_size=3
    ):
        super().__init__()
        self.dims = dims
        stride = (1, 2, 2)[-dims:]
        self.features = nn.Sequential()
        self.features.add_module("conv0", CONVOLUTIONS[dims](3, features, 7, stride=stride, padding=3, bias=False))
        self.features.add_module("norm0", NORMS[dims](features))
        self.features.add_module("relu0", nn.ReLU(inplace=True))
        self.features.add_module("pool0", MAX_POOLS[dims](kernel_size=3, stride=2, padding=1))
        for index, layers in enumerate(block_config, start=1):
            self.features.add_module(
                f"denseblock{index}", block(dims, layers, features, growth_rate, bn_size, drop_rate)
            )
            features += layers * growth_rate
            if index < len(block_config):
                transition = nn.Sequential()
                transition.add_module("norm", NORMS[dims](features))
                transition.add_module("relu", nn.ReLU(inplace=True))
                transition.add_module("conv", CONVOLUTIONS[dims](features, features // 2, 1, bias=False))
                transition.add_module("pool", AVG_POOLS[dims](kernel_size=2, stride=2))
                self.features.add_module(f"transition{index}", transition)
                features //= 2
        self.features.add_module("norm5", NORMS[dims](features))
        self.classifier = nn.Linear(features, 5)

    def forward(self, x):
        out = F.relu(self.features(x), inplace=True)
        return self.classifier(out.flatten(2).mean(2))
