"""Bad input: an error of the type that PyTorch raises for the naive model, in one line; NaN and Inf come out."""

import copy
import re

import pytest
import torch
from cases import LEVELS, MODES, VARIANTS, loss_of, make_images, make_pair

from densenet_efficient import EfficientDenseNet, kernels
from densenet_efficient.models import create_model
from densenet_efficient.modules import DenseBlock

pytestmark = pytest.mark.usefixtures("one_thread")

FLOAT32 = {"dtype": torch.float32}
CIFAR = {"small_inputs": True}
# What is fed: (arguments of the models, their mode, the images, what the message says)
BAD_IMAGES = {
    "1D": ({}, "train", torch.zeros(33), r"1D|33"),
    "2D": ({}, "train", torch.zeros(33, 47), r"2D|33, 47"),
    "3D": ({}, "train", torch.zeros(3, 33, 47), r"3, 33, 47|3D"),
    "3D of other channels": ({}, "train", torch.zeros(2, 3, 33), r"3D"),
    "5D": ({}, "train", torch.zeros(1, 3, 1, 33, 47), r"5D|1, 3, 1, 33, 47"),
    "3D small": (CIFAR, "train", torch.zeros(3, 33, 47), r"3D"),
    "5D small": (CIFAR, "train", torch.zeros(1, 3, 1, 9, 9), r"5D|1, 3, 1, 9, 9"),
    "one channel": ({}, "train", torch.zeros(2, 1, 33, 47), r"3 channels.*1"),
    "four channels": (CIFAR, "train", torch.zeros(2, 4, 33, 47), r"3 channels.*4"),
    "channels last in memory order": ({}, "train", torch.zeros(2, 33, 47, 3), r"3 channels.*33"),
    "too small to pool": ({}, "train", torch.zeros(2, 3, 4, 4), r"too small"),
    "too small to pool, small": (CIFAR, "eval", torch.zeros(2, 3, 1, 9), r"too small"),
    "too low": ({}, "train", torch.zeros(2, 3, 4, 47), r"too small"),
    "no height": ({}, "train", torch.zeros(2, 3, 0, 47), r"small|0"),
    "no width": (CIFAR, "train", torch.zeros(2, 3, 33, 0), r"size"),
    "int64": ({}, "train", torch.zeros(2, 3, 33, 47, dtype=torch.int64), r"[Ii]nput type"),
    "uint8": (CIFAR, "eval", torch.zeros(2, 3, 33, 47, dtype=torch.uint8), r"type"),
    "bool": ({}, "eval", torch.zeros(2, 3, 33, 47, dtype=torch.bool), r"[Ii]nput type"),
    "float64": ({}, "train", torch.zeros(2, 3, 33, 47, dtype=torch.float64), r"[Ii]nput type.*double|float64"),
    "bfloat16": (CIFAR, "eval", torch.zeros(2, 3, 33, 47, dtype=torch.bfloat16), r"[Ii]nput type.*bfloat16|BFloat16"),
    "complex64": ({}, "train", torch.zeros(2, 3, 33, 47, dtype=torch.complex64), r"[Ii]nput type"),
    "one value per channel": (
        {"block_config": (3,), **CIFAR}, "train", torch.zeros(1, 3, 1, 1), r"more than 1 value per channel",
    ),
    "one value per channel at the last norm": (CIFAR, "train", torch.zeros(1, 3, 3, 3), r"more than 1 value"),
    "one value per channel in the stem": ({}, "train", torch.zeros(1, 3, 1, 1), r"more than 1 value per channel"),
    "one value per channel after the stem": (
        {"block_config": (3,)}, "train", torch.zeros(1, 3, 4, 4), r"more than 1 value per channel",
    ),
    "one value per channel, too small to pool": ({}, "train", torch.zeros(1, 3, 4, 4), r"more than 1 value"),
}  # fmt: skip


def error_of(model, images):
    with pytest.raises((RuntimeError, ValueError, TypeError, IndexError)) as caught:
        model(images)
    return caught.value


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("arguments", "mode", "images", "message"), BAD_IMAGES.values(), ids=BAD_IMAGES)
def test_errors_are_of_pytorchs_type(backend, arguments, mode, images, message, level):
    naive, efficient = make_pair(mode=mode, checkpointing=level, **FLOAT32, **arguments)
    before = {name: buffer.clone() for name, buffer in efficient.named_buffers()}
    expected, error = error_of(naive, images), error_of(efficient, images)
    assert isinstance(expected, type(error)), (error, expected)
    assert_one_line(error, message)
    assert all(torch.equal(buffer, before[name]) for name, buffer in efficient.named_buffers())


def assert_one_line(error, message):
    text = str(error)
    assert "\n" not in text
    assert re.search(message, text), text


def test_no_tensor_at_all(backend):
    naive, efficient = make_pair(**FLOAT32)
    for images in (None, [[1.0]], "image", make_images(2, 3, 33, 47).numpy()):
        expected = type(caught_by(naive, images))
        assert type(caught_by(efficient, images)) is expected


def test_no_tensor_for_a_block_alone(backend):
    block = DenseBlock(1, 8)
    for images in (None, [[1.0]]):
        with pytest.raises(TypeError, match=r"expected a Tensor \[N, 8, H, W\], got a"):
            block(images)


@pytest.mark.parametrize("dilation", [1.5, "2", None])
def test_a_dilation_that_is_none(dilation):
    with pytest.raises(TypeError, match=f"dilation must be an int, or a sequence of one per layer, got {dilation!r}"):
        DenseBlock(2, 8, dilation=dilation)


def caught_by(model, images):
    with pytest.raises((TypeError, AttributeError)) as caught:
        model(images)
    return caught.value


@pytest.mark.parametrize("arguments", [{}, CIFAR], ids=str)
def test_mismatched_devices(monkeypatch, arguments):
    monkeypatch.delenv(kernels.BACKEND_VARIABLE, raising=False)
    _, efficient = make_pair(**FLOAT32, **arguments)
    images = torch.zeros(2, 3, 33, 47)
    for model, given in ((efficient, images.to("meta")), (copy.deepcopy(efficient).to("meta"), images)):
        assert_one_line(error_of(model, given), r"same device.*(meta.*cpu|cpu.*meta)")


PARTS = [
    "conv0", "norm0", "denseblock1.denselayer2", "denseblock1.denselayer2.norm2", "transition1.norm",
    "transition1.conv", "norm5",
]  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("part", PARTS)
def test_parts_on_another_device(backend, part, mode):
    """Left behind when the model moved: no running statistics change, with or without a gradient."""
    _, efficient = make_pair(mode=mode, **FLOAT32)
    images = torch.zeros(2, 3, 33, 47)
    efficient.features.get_submodule(part).to("meta")
    buffers = {name: buffer for name, buffer in efficient.named_buffers() if buffer.device.type == "cpu"}
    before = copy.deepcopy(buffers)
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            assert_one_line(error_of(efficient, images), r"same device.*cpu.*meta")
    assert all(torch.equal(buffer, before[name]) for name, buffer in buffers.items())


@pytest.mark.parametrize("buffer", ["running_mean", "running_var"])
@pytest.mark.parametrize("part", ["norm0", "denseblock1.denselayer2.norm1", "transition1.norm", "norm5"])
def test_running_statistics_on_another_device(backend, part, buffer):
    """Where they are used, with or without a gradient."""
    _, efficient = make_pair(mode="eval", **FLOAT32)
    norm = efficient.features.get_submodule(part)
    setattr(norm, buffer, getattr(norm, buffer).to("meta"))
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            assert_one_line(error_of(efficient, torch.zeros(2, 3, 33, 47)), r"same device.*cpu.*meta")


def test_parts_of_another_dtype(backend):
    """A convolution left in another dtype raises in the naive model, and so it does here, before buffers change."""
    naive, efficient = make_pair(**FLOAT32)
    for model in (naive, efficient):
        model.features.denseblock2.denselayer2.conv2.double()
    before = copy.deepcopy(dict(efficient.named_buffers()))
    images = make_images(2, 3, 33, 47, dtype=torch.float32)
    assert type(error_of(efficient, images)) is type(error_of(naive, images))
    assert all(torch.equal(buffer, before[name]) for name, buffer in efficient.named_buffers())


@pytest.mark.parametrize("path", ["denseblock1.denselayer2.norm2", "norm5"])
def test_one_value_per_channel_where_one_norm_trains(backend, path):
    pair = make_pair(mode="eval", block_config=(3,), **CIFAR, **FLOAT32)
    for model in pair:
        model.features.get_submodule(path).train()
    expected, error = (error_of(model, torch.zeros(1, 3, 1, 1)) for model in pair)
    assert type(error) is type(expected) is ValueError
    assert_one_line(error, "more than 1 value per channel")


@pytest.mark.parametrize("arguments", [{}, CIFAR], ids=str)
def test_integers_are_refused_under_autocast_too(backend, arguments):
    pair = make_pair(mode="eval", **FLOAT32, **arguments)
    with torch.autocast("cpu", torch.bfloat16):
        expected, error = (error_of(model, torch.zeros(2, 3, 33, 47, dtype=torch.int64)) for model in pair)
    assert type(error) is type(expected)
    assert_one_line(error, "type")


@pytest.mark.parametrize("size", [(2, 3), (3, 2)])
def test_the_smallest_images_that_a_transition_pools(backend, size):
    naive, efficient = make_pair(mode="eval", **CIFAR)
    images = make_images(2, 3, *size)
    torch.testing.assert_close(efficient(images), naive(images), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("arguments", [{}, CIFAR, {"bottleneck": False}], ids=str)
def test_a_batch_of_nothing(backend, arguments):
    """An empty last batch in evaluation gives no logits, and no error."""
    naive, efficient = make_pair(mode="eval", **FLOAT32, **arguments)
    images = torch.zeros(0, 3, 33, 47)
    assert efficient(images).shape == naive(images).shape == (0, 5)
    with torch.inference_mode():
        assert efficient(images).shape == (0, 5)


@pytest.mark.parametrize("checkpointing", ["none", "bottleneck"])
@pytest.mark.parametrize("arguments", [{}, CIFAR, {"bottleneck": False}], ids=str)
def test_training_on_a_batch_of_nothing(backend, arguments, checkpointing):
    """As torch has it: it is counted, changes no running statistics, and every gradient is zero."""
    naive, efficient = make_pair(**FLOAT32, **arguments)
    efficient.checkpointing = checkpointing
    images = torch.zeros(0, 3, 33, 47)
    for model in (naive, efficient):
        model(images).sum().backward()
    expected = naive.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in efficient.state_dict().items())
    assert all(not parameter.grad.any() for parameter in efficient.parameters())


def test_a_block_alone_checks_its_input(backend):
    naive, efficient = make_pair(**FLOAT32)
    blocks = [model.features.denseblock1 for model in (naive, efficient)]
    for shape in [(2, 5, 7, 7), (6, 7, 7), (1, 6, 1, 1)]:
        expected, error = (error_of(block, torch.zeros(shape)) for block in blocks)
        assert type(error) is type(expected), (error, expected)
        assert "\n" not in str(error)


def test_unknown_level_and_variant():
    with pytest.raises(ValueError, match=r"checkpointing.*none, bottleneck.*'all'"):
        EfficientDenseNet(checkpointing="all")
    model = EfficientDenseNet(growth_rate=2, block_config=(1,), num_init_features=2)
    with pytest.raises(ValueError, match=r"checkpointing.*'all'"):
        model.checkpointing = "all"
    with pytest.raises(ValueError, match="unknown model 'densenet-x'"):
        create_model("densenet-x")
    with pytest.raises(TypeError, match="variant"):
        EfficientDenseNet(variant="bc")


NON_FINITE = [torch.nan, torch.inf, -torch.inf]


@pytest.mark.parametrize("value", NON_FINITE)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("small_inputs", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
def test_non_finite_images_come_out(backend, variant, small_inputs, mode, value):
    """In evaluation in the logits of their own image alone, in training in all: as in the naive model."""
    naive, efficient = make_pair(mode=mode, small_inputs=small_inputs, **VARIANTS[variant])
    images = make_images(3, 3, 33, 47)
    images[1, 2, 20, 30] = value
    expected, logits = naive(images), efficient(images)
    assert torch.equal(logits.isnan(), expected.isnan())
    assert not expected[1].isfinite().any()
    assert torch.equal(logits.isfinite(), expected.isfinite())
    for outputs in (expected, logits):
        loss_of(outputs).backward()
    gradients = dict(efficient.named_parameters())
    for name, parameter in naive.named_parameters():
        hidden = gradients[name].grad.isfinite() & ~parameter.grad.isfinite()
        assert not hidden.any(), name
    for name, buffer in naive.named_buffers():
        assert torch.equal(efficient.get_buffer(name).isfinite(), buffer.isfinite()), name


@pytest.mark.parametrize("path", ["denseblock1.denselayer1.conv1", "transition1.conv", "norm5"])
def test_non_finite_weights_come_out(backend, path):
    results = []
    for model in make_pair(mode="eval"):
        with torch.no_grad():
            model.features.get_submodule(path).weight.view(-1)[0] = torch.nan
        results.append(model(make_images(3, 3, 33, 47)))
    assert results[0].isnan().any()
    assert torch.equal(results[1].isnan(), results[0].isnan())


def test_a_state_dict_with_a_missing_or_unexpected_key():
    _, efficient = make_pair()
    state = efficient.state_dict()
    removed = next(iter(state))
    del state[removed]
    with pytest.raises(RuntimeError, match=rf"Missing key.*{removed}"):
        efficient.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*surprise"):
        efficient.load_state_dict(efficient.state_dict() | {"surprise": torch.zeros(1)})
