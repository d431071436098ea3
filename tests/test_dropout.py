"""One seed drops the same features in one operator, layer by layer and in the naive model, whatever the layout is."""

import copy
import warnings

import pytest
import test_segmentation
import torch
import torchvision
from cases import assert_close, make_images, make_pair, needs_native, step
from torch import nn

from densenet_efficient import convert, operators
from densenet_efficient.dropout import Dropout, dropout

pytestmark = [
    pytest.mark.usefixtures("one_thread", "nan_memory"),
    pytest.mark.filterwarnings("ignore:a dense block runs layer by layer"),
]

IMAGES = (3, 3, 33, 47)  # behind the stem they are channels-last


def observe(*modules):
    for module in modules:
        module.register_forward_hook(lambda *_: None)


def layers_of(model):
    return [layer for name, block in model.features.named_children() if "block" in name for layer in block.values()]


@pytest.mark.parametrize("bottleneck", [True, False])
@pytest.mark.parametrize("hooked", [[0], [1, 4]], ids=str)
def test_a_hooked_block_drops_what_the_operator_drops(backend, hooked, bottleneck):
    naive, efficient = make_pair(drop_rate=0.3, bottleneck=bottleneck)
    by_layers = copy.deepcopy(efficient)
    observe(*(layers_of(by_layers)[index] for index in hooked))
    images = make_images(*IMAGES)
    fused, layered = (step(model, images, seed=1) for model in (efficient, by_layers))
    assert_close(layered, fused)
    assert_close(layered, step(naive, images, seed=1))


@pytest.mark.parametrize("hooked", [0, 1])
def test_a_hooked_block_of_a_converted_model_drops_what_the_original_drops(backend, hooked):
    """A stem or a transition of ours gives it channels-last features, of which F.dropout would draw other numbers."""
    torch.manual_seed(0)
    original = torchvision.models.DenseNet(4, (2, 2), 6, bn_size=2, drop_rate=0.3, num_classes=5).double()
    converted = copy.deepcopy(original)
    convert(converted)
    observe(layers_of(converted)[2 * hooked + 1])
    images = make_images(*IMAGES)
    assert_close(step(converted, images, seed=1), step(original, images, seed=1))


@needs_native
@pytest.mark.parametrize(("mode", "drop_rate"), [("eval", 0.5), ("frozen", 0.0)])
def test_where_nothing_is_dropped_an_inference_is_prepared(mode, drop_rate, monkeypatch):
    naive, efficient = make_pair(mode=mode, drop_rate=drop_rate)
    images = make_images(*IMAGES)
    monkeypatch.setattr(operators, "dense_stage", lambda *_: pytest.fail("a stage ran as in training"))
    with torch.inference_mode():
        assert_close({"": efficient(images)}, {"": naive(images)})


CHANGES = {
    "one layer in evaluation": lambda layer: layer.eval(),
    "one layer without": lambda layer: setattr(layer, "drop_rate", 0.0),
    "one layer of another rate": lambda layer: setattr(layer, "drop_rate", 0.6),
}


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("change", CHANGES)
def test_layers_of_their_own_dropout(backend, change, memory_format):
    """The numbers are those that the naive model draws for contiguous images."""
    naive, efficient = make_pair(drop_rate=0.3)
    for model in (naive, efficient):
        CHANGES[change](layers_of(model)[1])
    images = make_images(*IMAGES)
    result = step(efficient, images.contiguous(memory_format=memory_format), seed=1)
    assert_close(result, step(naive, images, seed=1))


@pytest.mark.parametrize("path", ["down_blocks.1.denselayer1", "transitions_down.0.conv", "transitions_down.1.drop"])
def test_a_hooked_transition_down_drops_what_the_operator_drops(backend, path):
    naive, efficient = test_segmentation.make_pair(drop_rate=0.3)
    observe(efficient.get_submodule(path))
    images = make_images(2, 3, 13, 15)
    assert_close(step(efficient, images, seed=1), step(naive, images, seed=1))


def test_a_stock_dropout_in_a_transition_down(backend):
    """As a user may put it there."""
    naive, efficient = test_segmentation.make_pair(drop_rate=0.3)
    efficient.transitions_down[0].drop = nn.Dropout(0.3)
    images = make_images(2, 3, 13, 15)
    assert_close(step(efficient, images, seed=1), step(naive, images, seed=1))


@pytest.mark.parametrize("drop_rate", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("training", [True, False])
def test_it_is_that_of_torch(drop_rate, training):
    results = []
    for make, layout in ((nn.Dropout, torch.contiguous_format), (Dropout, torch.channels_last)):
        x = make_images(2, 5, 6, 7).contiguous(memory_format=layout).requires_grad_()
        torch.manual_seed(0)
        out = make(drop_rate).train(training)(x)
        out.square().sum().backward()
        results.append({"out": out, "gradient": x.grad})
        assert out.is_contiguous(memory_format=layout)
    assert_close(*results)


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_under_vmap(randomness):
    x = torch.ones(3, 2, 4, 5, 6)
    first, second, _ = torch.vmap(lambda images: dropout(images, 0.5, True), randomness=randomness)(x)
    assert torch.equal(first, second) == (randomness == "same")


def test_layers_without_dropout_in_modes_of_their_own(backend):
    """Where nothing is dropped a layer's mode tells nothing but its norms'."""
    pair = make_pair()
    for model in pair:
        for layer in layers_of(model)[:2]:
            layer.eval().requires_grad_(False)
        layers_of(model)[0].drop_rate = 0.5  # in evaluation
    images = make_images(*IMAGES)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_close(*(step(model, images) for model in reversed(pair)))
