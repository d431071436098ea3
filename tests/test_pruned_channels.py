"""Channels that a user took away by other tensors, while the modules' attributes say what they said."""

import pytest
import torch
from cases import LEVELS, MODES, assert_close, make_images, make_pair, set_mode, step
from conversion_cases import make_models
from torch import nn

from densenet_efficient import convert

pytestmark = [
    pytest.mark.usefixtures("one_thread", "nan_memory"),
    pytest.mark.filterwarnings("ignore:a dense block runs layer by layer"),
]

IMAGES = (3, 3, 33, 47)
LAYER = "denseblock1.denselayer2"


def keep_outputs(conv, kept):
    conv.weight = nn.Parameter(conv.weight.detach()[kept].clone())


def keep_inputs(conv, kept):
    conv.weight = nn.Parameter(conv.weight.detach()[:, kept].clone())


def keep_channels(norm, kept):
    for name, parameter in list(norm.named_parameters()):
        setattr(norm, name, nn.Parameter(parameter.detach()[kept].clone()))
    for name in ("running_mean", "running_var"):
        setattr(norm, name, getattr(norm, name)[kept].clone())


def prune_a_bottleneck(model):
    layer, kept = model.features.get_submodule(LAYER), torch.arange(7)
    keep_outputs(layer.conv1, kept)
    keep_channels(layer.norm2, kept)
    keep_inputs(layer.conv2, kept)


def prune_a_bottleneck_in_place(model):
    """The same parameters, with other tensors within."""
    layer, kept = model.features.get_submodule(LAYER), torch.arange(7)
    for tensor in (layer.conv1.weight, *layer.norm2.parameters(), layer.norm2.running_mean, layer.norm2.running_var):
        tensor.data = tensor.data[kept].clone()
    layer.conv2.weight.data = layer.conv2.weight.data[:, kept].clone()


def prune_every_bottleneck(model):
    """All layers alike: they agree with each other, but not with their attributes."""
    for layer in model.features.denseblock1._modules.values():
        keep_outputs(layer.conv1, slice(7))
        keep_channels(layer.norm2, slice(7))
        keep_inputs(layer.conv2, slice(7))


def prune_a_stem(model):
    features = model.features
    keep_outputs(features.conv0, slice(5))
    keep_channels(features.norm0, slice(5))
    layers = features.denseblock1._modules.values()
    readers = [
        *((layer.norm1, layer.conv1) for layer in layers),
        (features.transition1.norm, features.transition1.conv),
    ]
    for norm, conv in readers:
        without = [channel for channel in range(norm.num_features) if channel != 5]
        keep_channels(norm, without)
        keep_inputs(conv, without)


def prune_a_transition(model):
    """What reads it, the second block and the last norm, loses a channel with it."""
    features = model.features
    keep_outputs(features.transition1.conv, slice(8))
    for layer in features.denseblock2._modules.values():
        without = [channel for channel in range(layer.norm1.num_features) if channel != 8]
        keep_channels(layer.norm1, without)
        keep_inputs(layer.conv1, without)
    without = [channel for channel in range(features.norm5.num_features) if channel != 8]
    keep_channels(features.norm5, without)
    model.classifier.weight = nn.Parameter(model.classifier.weight.detach()[:, without].clone())


PRUNINGS = [
    prune_a_bottleneck,
    prune_a_bottleneck_in_place,
    prune_every_bottleneck,
    prune_a_stem,
    prune_a_transition,
]


def assert_same_steps_and_inferences(found, expected):
    for seed in range(2):
        images = make_images(*IMAGES, seed=seed)
        assert_close(*(step(model, images) for model in (found, expected)))
        with torch.no_grad():
            assert_close(*({"": model(images)} for model in (found, expected)))
        for model in (found, expected):
            model.zero_grad()


@pytest.mark.parametrize("runs_before", [False, True])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("prune", PRUNINGS)
def test_pruned_channels(backend, prune, mode, level, runs_before):
    """Also where something is kept of the block as it was."""
    naive, efficient = make_pair(mode=mode, checkpointing=level)
    for model in (naive, efficient):
        if runs_before:
            step(model, make_images(*IMAGES))
            with torch.no_grad():
                model(make_images(*IMAGES))
            model.zero_grad()
        prune(model)
    assert_same_steps_and_inferences(efficient, naive)


@pytest.mark.parametrize("prune", PRUNINGS)
def test_a_converted_model(backend, prune):
    original, converted = make_models("torchvision")
    convert(converted)
    for model in (original, converted):
        prune(model)
    assert_same_steps_and_inferences(converted, original)


@pytest.mark.parametrize("is_norm", [False, True])
def test_a_pruned_block_says_so_and_what_would_help(backend, is_norm):
    _, efficient = make_pair()
    prune_a_bottleneck(efficient)
    layer = efficient.features.get_submodule(LAYER)
    if is_norm:
        layer.conv1.out_channels = 7
    expected = r"norm2 has parameters of 7 channels, its num_features are 12" if is_norm else r"conv1 has a weight of"
    with pytest.warns(UserWarning, match=rf"layer by layer.*denselayer2\.{expected}"):
        efficient(make_images(*IMAGES))


def test_attributes_put_right_make_it_one_operator_again(backend, recwarn):
    naive, efficient = make_pair()
    for model in (naive, efficient):
        prune_every_bottleneck(model)
        for layer in model.features.denseblock1._modules.values():
            layer.conv1.out_channels = layer.norm2.num_features = layer.conv2.in_channels = 7
    assert_same_steps_and_inferences(efficient, set_mode(naive, "train"))
    assert not [warning for warning in recwarn if "layer by layer" in str(warning.message)]
