"""The DenseNets of other libraries, small ones, and models that contain one: what `convert` is tested on."""

import copy
from collections import OrderedDict

import pytorch_lightning
import timm
import torch
import torchvision
import torchxrayvision
from cases import loss_of, randomise, set_mode
from monai.networks.nets import densenet as monai_densenet
from segmentation_models_pytorch.encoders.densenet import DenseNetEncoder
from timm.layers import BlurPool2d
from timm.models.densenet import DenseNet as TimmDenseNet
from torch import nn
from torchvision.models.detection.backbone_utils import BackboneWithFPN

BLOCKS = (3, 2)


def torchvision_densenet(**arguments):
    return torchvision.models.DenseNet(4, BLOCKS, 6, 3, num_classes=5, **arguments)


def timm_densenet(**arguments):
    return TimmDenseNet(4, BLOCKS, bn_size=3, num_classes=5, **arguments)


def monai_densenet2d(spatial_dims=2, **arguments):
    return monai_densenet.DenseNet(spatial_dims, 3, 5, 6, 4, BLOCKS, 3, **arguments)


def xray(drop_rate=0):
    return torchxrayvision.models.DenseNet(4, BLOCKS, 6, 3, drop_rate, 5, in_channels=3)


SOURCES = {
    "torchvision": torchvision_densenet,
    "torchvision memory_efficient": lambda: torchvision_densenet(memory_efficient=True),
    "torchvision dropout": lambda: torchvision_densenet(drop_rate=0.3),
    "timm": timm_densenet,
    "timm memory_efficient": lambda: timm_densenet(memory_efficient=True),
    "timm dropout": lambda: timm_densenet(proj_drop_rate=0.3, drop_rate=0.2),
    "timm deep blur": lambda: timm_densenet(stem_type="deep", aa_layer=BlurPool2d),
    "timm blur everywhere": lambda: timm_densenet(aa_layer=BlurPool2d, aa_stem_only=False),
    "timm maximum": lambda: timm_densenet(global_pool="max"),
    "timm without pooling": lambda: timm_densenet(global_pool="").features,
    "MONAI": monai_densenet2d,
    "MONAI dropout": lambda: monai_densenet2d(dropout_prob=0.3),
    "torchxrayvision": xray,
    "torchxrayvision dropout": lambda: xray(0.3),
}


class PyramidDetector(nn.Module):
    """As a RetinaNet's backbone: features of three depths into a pyramid."""

    def __init__(self):
        super().__init__()
        names = {"denseblock1": "0", "transition1": "1", "denseblock2": "2"}
        self.backbone = BackboneWithFPN(torchvision_densenet().features, names, [18, 9, 17], 8)

    def forward(self, x):
        return flattened(self.backbone(x))


class UNet(nn.Module):
    """A forward of its own over torchvision's features, with skips from the blocks."""

    def __init__(self):
        super().__init__()
        self.encoder = torchvision_densenet().features
        self.decoder = nn.Conv2d(18 + 17, 2, 3, padding=1)

    def forward(self, x):
        stem = self.encoder[:4](x)
        skip = self.encoder.denseblock1(stem)
        deep = self.encoder.norm5(self.encoder.denseblock2(self.encoder.transition1(skip)))
        up = nn.functional.interpolate(deep, skip.shape[2:])
        return self.decoder(torch.cat([up, skip], 1))


class SegmentationEncoder(nn.Module):
    """The encoder of segmentation_models_pytorch's U-Nets, which calls every module by name, a transition's too."""

    def __init__(self):
        super().__init__()
        sizes = {"growth_rate": 4, "block_config": (3, 2, 2, 2), "num_init_features": 6, "bn_size": 3}
        self.encoder = DenseNetEncoder([3, 6, 18, 17, 16, 16], **sizes)

    def forward(self, x):
        return flattened(OrderedDict(enumerate(self.encoder(x))))


class LightningClassifier(pytorch_lightning.LightningModule):
    """A network within a Lightning module, which trains it."""

    def __init__(self):
        super().__init__()
        self.network = torchvision_densenet()

    def forward(self, x):
        return self.network(x)

    def training_step(self, batch, _):
        return loss_of(self(batch))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


class OwnForward(nn.Module):
    """Blocks and transitions among a user's own modules, called by name."""

    def __init__(self):
        super().__init__()
        for name, module in torchvision_densenet().features.named_children():
            setattr(self, name, module)

    def forward(self, x):
        x = self.pool0(self.relu0(self.norm0(self.conv0(x))))
        return self.norm5(self.denseblock2(self.transition1(self.denseblock1(x))))


class TimmFeatures(nn.Module):
    """timm's features_only, at these indices."""

    def __init__(self, out_indices):
        super().__init__()
        arguments = {"growth_rate": 4, "block_config": BLOCKS, "bn_size": 3}
        self.net = timm.create_model("densenet121", features_only=True, out_indices=out_indices, **arguments)

    def forward(self, x):
        return flattened(OrderedDict(enumerate(self.net(x))))


def flattened(features):
    return torch.cat([value.flatten(1) for value in features.values()], 1)


CONTAINERS = {
    "pyramid": PyramidDetector,
    "U-Net": UNet,
    "segmentation encoder": SegmentationEncoder,
    "Lightning module": LightningClassifier,
    "own forward": OwnForward,
    "timm features": lambda: TimmFeatures((0, 1, 2)),
    "timm deep features": lambda: TimmFeatures((1, 2)),
    "sequence": lambda: nn.Sequential(nn.Conv2d(3, 3, 1), torchvision_densenet(), nn.Linear(5, 2)),
}
MODELS = SOURCES | CONTAINERS


def make_model(name, mode="train", seed=0):
    """A model of `MODELS` with random weights, in float64."""
    torch.manual_seed(seed)
    model = MODELS[name]()
    randomise(model, seed)
    return set_mode(model.double(), mode)


def make_models(name, mode="train", seed=0):
    """(the original, one to convert) with equal weights and buffers.

    The original does not checkpoint: theirs updates the running statistics twice (pytorch/pytorch#96136).
    """
    model = make_model(name, mode, seed)
    original = copy.deepcopy(model)
    for module in original.modules():
        for flag in ("memory_efficient", "grad_checkpointing"):
            if flag in vars(module):
                setattr(module, flag, False)
    return original, model
