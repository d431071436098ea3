"""Modules of other channels than their neighbours: PyTorch's own error, and no kernel that reads beyond a tensor."""

import pytest
import torch
from cases import MODES, make_images, make_pair
from torch import nn

from densenet_efficient import FCDenseNet
from densenet_efficient.reference import NaiveFCDenseNet

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:a dense block runs layer by layer"),
]

LAYER = "denseblock1.denselayer1"
MISMATCHES = {  # which norm or convolution is replaced, and by how many channels it has too many
    "stem's norm, few": ("norm0", -3),
    "stem's norm, many": ("norm0", 8),
    "layer's second norm": (f"{LAYER}.norm2", 4),
    "transition's norm, few": ("transition1.norm", -3),
    "transition's norm, many": ("transition1.norm", 8),
    "transition's convolution": ("transition1.conv", 4),
    "last norm": ("norm5", 4),
}


def replace(model, path, added):
    """The norm or 1x1 convolution at this path by one of other input channels."""
    parent, _, name = path.rpartition(".")
    parent, old = model.get_submodule(parent), model.get_submodule(path)
    if isinstance(old, nn.Conv2d):
        setattr(parent, name, nn.Conv2d(old.in_channels + added, old.out_channels, 1, bias=False))
    else:
        setattr(parent, name, nn.BatchNorm2d(old.num_features + added))


def assert_same_error(pair, images, training):
    messages = []
    for model in pair:
        model.train(training)
        with torch.set_grad_enabled(training), pytest.raises(RuntimeError) as caught:
            model(images)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("path", "added"), MISMATCHES.values(), ids=MISMATCHES)
def test_pytorch_refuses_it(backend, path, added, mode):
    pair = make_pair(dtype=torch.float32)
    for model in pair:
        replace(model.features, path, added)
    assert_same_error(pair, make_images(2, 3, 33, 47, dtype=torch.float32), mode == "train")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("path", ["norm", "conv"])
def test_pytorch_refuses_a_transition_down(backend, path, mode):
    pair = [network(4, (1, 1), 8, 0.0, 3) for network in (NaiveFCDenseNet, FCDenseNet)]
    for model in pair:
        replace(model.transitions_down[0], path, 4)
    assert_same_error(pair, torch.zeros(2, 3, 8, 8), mode == "train")


@pytest.mark.parametrize("path", ["norm0", f"{LAYER}.norm2", "transition1.norm", "norm5"])
def test_one_channel_is_not_spread_over_all(backend, path):
    """By broadcasting, plain torch would."""
    pair = make_pair(dtype=torch.float32)
    for model in pair:
        old = model.features.get_submodule(path)
        replace(model.features, path, 1 - old.num_features)
    assert_same_error(pair, make_images(2, 3, 33, 47, dtype=torch.float32), training=False)
