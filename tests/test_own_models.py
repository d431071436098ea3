"""The code of docs/own_models.md, run: equal results, and the memory of its tables."""

import copy
import re
from pathlib import Path

import pytest
import torch
from cases import assert_close, loss_of, make_images, randomise, saved_bytes
from torch import nn

from densenet_efficient import concatenate

pytestmark = pytest.mark.usefixtures("one_thread", "nan_memory")

PAGE = (Path(__file__).parent.parent / "docs" / "own_models.md").read_text(encoding="utf-8")
SIZES = (64, 32, 16)


@pytest.fixture(scope="module")
def page():
    """The names that the page's code defines, in the order in which it stands there."""
    names = {}
    for code in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        exec(code, names)
    return names


def sharing(block_class):
    """``block_class`` with `concatenate`."""

    class Sharing(block_class):
        def forward(self, x):
            channels = x.shape[1] + sum(layer[-1].weight.shape[0] for layer in self.layers)
            for layer in self.layers:
                x = concatenate([x, layer(x)], channels=channels)
            return x

    return Sharing


def blocks_of(page):
    """By the tables' names."""
    return {
        "`GrowingBlock`": page["GrowingBlock"](*SIZES),
        "`SharingBlock`": page["SharingBlock"](*SIZES),
        "`NormalisingBlock` with `torch.cat`": page["NormalisingBlock"](*SIZES),
        "`NormalisingBlock` with `concatenate`": sharing(page["NormalisingBlock"])(*SIZES),
        "`DenseBlock`": page["block"],
    }


def results_of(block, images):
    images = images.detach().requires_grad_()
    features = block(images)
    loss_of(features).backward()
    return [features, images.grad, *(parameter.grad for parameter in block.parameters()), *block.buffers()]


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("`SharingBlock`", "`GrowingBlock`"),
        ("`NormalisingBlock` with `concatenate`", "`NormalisingBlock` with `torch.cat`"),
        ("`DenseBlock`", "`NormalisingBlock` with `torch.cat`"),
    ],
)
def test_every_block_gives_what_the_plain_one_gives(page, name, plain):
    blocks = {key: copy.deepcopy(block).double() for key, block in blocks_of(page).items()}
    randomise(blocks[plain])
    state = blocks[plain].state_dict().values()
    blocks[name].load_state_dict(dict(zip(blocks[name].state_dict(), state, strict=True)))
    images = make_images(2, 64, 6, 5)
    results, expected = (dict(enumerate(results_of(blocks[key], images))) for key in (name, plain))
    assert_close(results, expected)


def test_the_tables_are_measured(page):
    tables = dict(re.findall(r"^\| (`.*`.*?) \| ([\d.]+) \|$", PAGE, re.MULTILINE))
    images = make_images(1, 64, 56, 56, dtype=torch.float32)
    measured = {name: f"{saved_bytes(block, images) / 2**20:.1f}" for name, block in blocks_of(page).items()}
    assert tables == measured


def test_the_signal_network(page):
    net = page["SignalNet"]().double()
    assert set(map(type, net.features)) >= {nn.Conv1d, nn.BatchNorm1d}
    images = make_images(2, 12, 40).requires_grad_()
    randomise(net)
    results = []
    for model in (net, copy.deepcopy(net)):
        if model is not net:
            model.features.pooled = lambda x, children=list(model.features): by_modules(children, x)
        torch.manual_seed(0)
        logits = model(images)
        loss_of(logits).backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        results.append({"logits": logits, **gradients, **dict(model.named_buffers())})
    assert_close(*results)


def by_modules(children, x):
    """What `Features.pooled` gives, module by module."""
    for child in children:
        x = child.forward_by_layers(x) if hasattr(child, "forward_by_layers") else child(x)
    return x.relu().mean(2)
