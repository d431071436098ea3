"""The naive model is torchvision's bit for bit: what is compared with it is compared with torchvision."""

import ast
import inspect

import pytest
import torch
import torchvision
from torch import nn

from densenet_efficient import EfficientDenseNet, reference
from densenet_efficient.reference import NaiveDenseNet, NaiveFCDenseNet
from densenet_efficient.segmentation import FCDenseNet

TORCHVISION = {
    "densenet121": {"block_config": (6, 12, 24, 16)},
    "densenet161": {"block_config": (6, 12, 36, 24), "growth_rate": 48, "num_init_features": 96},
    "densenet169": {"block_config": (6, 12, 32, 32)},
    "densenet201": {"block_config": (6, 12, 48, 32)},
}
SMALL = {"growth_rate": 4, "block_config": (2, 3), "num_init_features": 8, "num_classes": 5}


pytestmark = pytest.mark.usefixtures("one_thread")


def seeded(constructor, **arguments):
    torch.manual_seed(0)
    return constructor(**arguments)


def assert_equal_tensors(actual, expected):
    assert list(actual) == list(expected)
    different = [name for name in expected if not torch.equal(actual[name], expected[name])]
    assert not different


def step(model, images, seed=0):
    """One forward and backward: everything that a training step computes, by name."""
    images = images.clone().requires_grad_()
    torch.manual_seed(seed)  # of the dropout
    logits = model(images)
    logits.square().mean().backward()
    gradients = {f"{name}.grad": parameter.grad for name, parameter in model.named_parameters()}
    return {"logits": logits, "images.grad": images.grad, **gradients, **dict(model.named_buffers())}


@pytest.mark.parametrize("name", TORCHVISION)
def test_is_torchvision_bit_for_bit(name):
    expected = seeded(getattr(torchvision.models, name))
    actual = seeded(NaiveDenseNet, **TORCHVISION[name])
    assert [name for name, _ in actual.named_modules()] == [name for name, _ in expected.named_modules()]
    assert_equal_tensors(actual.state_dict(), expected.state_dict())
    images = torch.randn(2, 3, 33, 47)
    assert_equal_tensors(step(actual, images), step(expected, images))
    with torch.no_grad():
        assert torch.equal(actual.eval()(images), expected.eval()(images))


def test_dropout_is_torchvisions():
    arguments = {**SMALL, "drop_rate": 0.3}
    expected = seeded(torchvision.models.DenseNet, **arguments)
    actual = seeded(NaiveDenseNet, **arguments)
    images = torch.randn(2, 3, 64, 64)
    dropped = step(actual, images)
    assert_equal_tensors(dropped, step(expected, images))
    assert not torch.equal(dropped["logits"], step(actual, images, seed=1)["logits"])


@pytest.mark.parametrize("ignored", [{"memory_efficient": False}, {"checkpointing": "none"}])
def test_memory_arguments_change_nothing(ignored):
    images = torch.randn(2, 3, 64, 64)
    expected = step(seeded(NaiveDenseNet, **SMALL), images)
    assert_equal_tensors(step(seeded(NaiveDenseNet, **SMALL, **ignored), images), expected)


@pytest.mark.parametrize("bottleneck", [True, False])
@pytest.mark.parametrize("small_inputs", [True, False])
@pytest.mark.parametrize("block_config", [(3,), (2, 1), (1, 2, 1, 2, 1)])
def test_variants_are_dense(bottleneck, small_inputs, block_config):
    """Each layer reads all channels before it, each transition compresses them."""
    model = NaiveDenseNet(
        4,
        block_config,
        6,
        num_classes=5,
        in_channels=2,
        compression=0.7,
        bottleneck=bottleneck,
        small_inputs=small_inputs,
    )
    channels = 6
    for index, num_layers in enumerate(block_config, start=1):
        for layer in range(1, num_layers + 1):
            dense_layer = model.get_submodule(f"features.denseblock{index}.denselayer{layer}")
            assert dense_layer.norm1.num_features == dense_layer.conv1.in_channels == channels
            assert [hasattr(dense_layer, name) for name in ("norm2", "relu2", "conv2")] == [bottleneck] * 3
            channels += 4
        if index < len(block_config):
            channels = int(channels * 0.7)
    assert model.features.norm5.num_features == model.classifier.in_features == channels
    assert [hasattr(model.features, name) for name in ("norm0", "relu0", "pool0")] == [not small_inputs] * 3
    results = step(model, torch.randn(2, 2, 80, 96))
    assert results["logits"].shape == (2, 5)
    assert results["images.grad"].abs().sum() > 0


def test_norms_have_the_eps_that_is_given():
    norms = [module for module in NaiveDenseNet(**SMALL, norm_eps=1e-3).modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms and {norm.eps for norm in norms} == {1e-3}


@pytest.mark.parametrize("pair", [(NaiveDenseNet, EfficientDenseNet), (NaiveFCDenseNet, FCDenseNet)])
def test_the_defaults_are_those_of_the_efficient_network(pair):
    naive, efficient = (inspect.signature(network).parameters for network in pair)
    for name in set(naive) & set(efficient):
        assert naive[name].default == efficient[name].default, name


def test_stands_alone():
    imports = [node for node in ast.walk(ast.parse(inspect.getsource(reference))) if isinstance(node, ast.ImportFrom)]
    modules = {node.module.split(".")[0] for node in imports}
    assert modules == {"__future__", "collections", "torch", "typing"}
    assert all(node.level == 0 for node in imports)
