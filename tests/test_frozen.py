"""Frozen parameters: only the gradients asked for, and no work for the others."""

import pytest
import torch
from cases import LEVELS, assert_close, count_calls, loss_of, make_images, make_pair

from densenet_efficient import Backbone, operators
from densenet_efficient.planning.shapes import blocks_of

pytestmark = pytest.mark.usefixtures("one_thread", "nan_memory")

IMAGES = (3, 3, 33, 47)


# Which parameters train, by a function of their index and name.
TRAINED = {
    "nothing": lambda index, name: False,
    "classifier": lambda index, name: name.startswith("classifier"),
    "norm5": lambda index, name: "norm5" in name,
    "transition conv": lambda index, name: "transition1.conv" in name,
    "transition norm": lambda index, name: "transition1.norm" in name,
    "last block": lambda index, name: "denseblock2" in name,
    "last layer": lambda index, name: "denseblock2.denselayer2" in name,
    "first block": lambda index, name: "denseblock1" in name,
    "stem": lambda index, name: "conv0" in name or "norm0" in name,
    "stem's norm": lambda index, name: "norm0" in name,
    "weights of norms": lambda index, name: "norm" in name and name.endswith("weight"),
    "biases": lambda index, name: name.endswith("bias"),
    "convolutions": lambda index, name: "conv" in name,
    "conv1": lambda index, name: "conv1" in name,
    "conv2": lambda index, name: "conv2" in name,
    "norm2": lambda index, name: "norm2" in name,
    "one bias": lambda index, name: name.endswith("denselayer2.norm1.bias"),
    "every third": lambda index, name: index % 3 == 0,
    "every fifth": lambda index, name: index % 5 == 2,
}


@pytest.mark.parametrize("bottleneck", [True, False])
@pytest.mark.parametrize("with_input", [True, False])
@pytest.mark.parametrize("mode", ["train", "frozen"])
@pytest.mark.parametrize("trained", TRAINED.values(), ids=TRAINED)
def test_frozen_parameters(backend, trained, mode, with_input, bottleneck):
    """The gradients asked for, and None for all others."""
    results = []
    for model in make_pair(mode=mode, bottleneck=bottleneck):
        for index, (name, parameter) in enumerate(model.named_parameters()):
            parameter.requires_grad_(trained(index, name))
        images = make_images(*IMAGES).requires_grad_(with_input)
        logits = model(images)
        if logits.requires_grad:
            loss_of(logits).backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        results.append({"logits": logits, "images": images.grad, **gradients, **dict(model.named_buffers())})
    assert_close(results[1], results[0])


def backward_calls(calls):
    return {name: number for name, number in calls.items() if name.endswith("backward") or name == "project_gradient"}


@pytest.mark.parametrize(
    ("trained", "expected"),
    [
        ("nothing", {}),
        ("classifier", {}),
        ("norm5", {"bn_relu_avg_pool_backward": 1}),
        (
            "last layer",
            {
                "bn_relu_avg_pool_backward": 1,
                "bn_relu_conv3x3_backward": IMAGES[0],  # of one image each
                "bn_relu_conv1x1_backward": IMAGES[0],
                "project_gradient": 1,
            },
        ),
    ],
)
def test_nothing_is_computed_for_frozen_parameters(backend, monkeypatch, trained, expected):
    _, efficient = make_pair()
    for index, (name, parameter) in enumerate(efficient.named_parameters()):
        parameter.requires_grad_(TRAINED[trained](index, name))
    calls = count_calls(backend, monkeypatch)
    logits = efficient(make_images(*IMAGES))
    if logits.requires_grad:
        loss_of(logits).backward()
    assert backward_calls(calls) == expected


@pytest.mark.parametrize("level", LEVELS)
def test_what_a_step_computes(backend, monkeypatch, level):
    """Of each operation as many calls as there are layers.

    Where bottlenecks are recomputed it is one more of each; in parts (here in both blocks), all but the last twice.
    """
    _, efficient = make_pair(checkpointing=level)
    for block in blocks_of(efficient):
        block.free_bottlenecks = {}  # which are not recomputed
    calls = count_calls(backend, monkeypatch)
    loss_of(efficient(make_images(*IMAGES))).backward()
    layers = 5
    parts = 1 if level == "none" else IMAGES[0]
    assert calls["bn_relu_conv3x3"] == layers
    assert calls["bn_relu_conv3x3_backward"] == calls["bn_relu_conv1x1_backward"] == parts * layers
    assert calls["bn_relu_conv1x1"] == (layers if level == "none" else 2 * parts * layers)
    assert calls["channel_stats"] == 1  # of the stem's convolution
    assert calls["write_with_statistics"] == 2  # of each block's input


def test_gradients_of_frozen_first_layers_keep_no_graph(backend):
    """Parameters frozen from the input up to a block: autograd does not reach them."""
    _, efficient = make_pair()
    for parameter in efficient.features[:6].parameters():
        parameter.requires_grad_(False)
    features = efficient.features[:6](make_images(*IMAGES))
    assert not features.requires_grad


@pytest.mark.parametrize(
    ("trained", "with_input", "with_grad", "expected"),
    [
        ("nothing", False, True, [0, 0]),
        ("nothing", True, True, [3, 2]),
        ("nothing", True, False, [0, 0]),
        ("classifier", False, True, [0, 0]),
        ("norm5", False, True, [0, 0]),
        ("last layer", False, True, [0, 1]),
        ("transition norm", False, True, [0, 2]),
        ("one bias", False, True, [2, 2]),
        ("stem's norm", False, True, [3, 2]),
    ],
)
@pytest.mark.parametrize("mode", ["train", "frozen"])
def test_no_bottleneck_is_kept_that_no_backward_reads(
    backend, monkeypatch, trained, with_input, with_grad, expected, mode
):
    _, model = make_pair(checkpointing="none", mode=mode)
    for index, (name, parameter) in enumerate(model.named_parameters()):
        parameter.requires_grad_(TRAINED[trained](index, name))
    if trained == "one bias":  # and that of the second block's second layer
        model.features.denseblock2.requires_grad_(False)
    kept, run = [], operators.dense_stage

    def count(*arguments):
        outputs = run(*arguments)
        kept.append(len(outputs[-1]))
        return outputs

    monkeypatch.setattr(operators, "dense_stage", count)
    monkeypatch.setattr("densenet_efficient.inference.applies", lambda x: False)
    with torch.set_grad_enabled(with_grad):
        model(make_images(*IMAGES).requires_grad_(with_input))
    assert kept == expected


@pytest.mark.parametrize("trains", [True, False])
def test_the_stem_keeps_its_convolution_for_a_backward_alone(backend, monkeypatch, trains):
    _, model = make_pair(checkpointing="none")
    model.features[:2].requires_grad_(trains)
    kept, run = [], operators.stem

    def count(*arguments):
        outputs = run(*arguments)
        kept.append(outputs[-1].numel() > 0)
        return outputs

    monkeypatch.setattr(operators, "stem", count)
    model(make_images(*IMAGES))
    assert kept == [trains]


@pytest.mark.parametrize("mode", ["train", "frozen"])
@pytest.mark.parametrize("level", LEVELS)
def test_an_exit_that_nobody_uses_has_no_gradient(backend, level, mode):
    """None, as from torch, and not zero: with it an optimizer's weight decay would change the weights."""
    naive, efficient = make_pair(checkpointing=level, mode=mode)
    outputs = [naive.features[:5](make_images(*IMAGES)), Backbone(efficient)(make_images(*IMAGES))["denseblock1"]]
    for output in outputs:
        loss_of(output).backward()
    expected, gradients = (
        {name: parameter.grad for name, parameter in model.named_parameters()} for model in (naive, efficient)
    )
    assert expected["features.transition1.conv.weight"] is None
    assert_close({"": outputs[1], **gradients}, {"": outputs[0], **expected})
