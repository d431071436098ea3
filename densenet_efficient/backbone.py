"""A DenseNet's features at every stride, for feature pyramids, detectors and decoders."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn

from .models import EfficientDenseNet
from .modules import run_named_children


class Backbone(nn.Module):
    """The outputs of the dense blocks, the last one behind its norm: strides 4, 8, 16 and 32 of an ImageNet network.

    These are the features of timm's ``features_only`` and of a torchvision ``IntermediateLayerGetter`` on the blocks.
    They cost nothing that the blocks do not keep anyway. ``forward`` maps images [N, in_channels, H, W] to an ordered
    dictionary of maps [N, channels[i], H / strides[i], W / strides[i]] under ``names``, as
    `torchvision.ops.FeaturePyramidNetwork` takes it.

    Args:
        model: its ``features`` are shared, under the same state_dict keys; the classifier is left out.

    Attributes:
        names: of the feature maps: "denseblock1", ..., and "norm5" for the last.
        channels: of each map.
        strides: of each map, in pixels of the image.

    Raises:
        TypeError: ``model`` is not an EfficientDenseNet.
    """

    def __init__(self, model: EfficientDenseNet) -> None:
        super().__init__()
        if not isinstance(model, EfficientDenseNet):
            raise TypeError(f"expected an EfficientDenseNet, got a {type(model).__name__}")
        self.features = model.features
        config = model.config
        layers = config["block_config"]
        self.names = [f"denseblock{index}" for index in range(1, len(layers))] + ["norm5"]
        self.strides = [(1 if config["small_inputs"] else 4) * 2**index for index in range(len(layers))]
        self.channels = []
        channels = config["num_init_features"]
        for num_layers in layers:
            self.channels.append(channels + num_layers * config["growth_rate"])
            channels = int(self.channels[-1] * config["compression"])

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        """The maps by name, the finest first."""
        return OrderedDict(run_named_children(self.features._modules, self.names, x))
