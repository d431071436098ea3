"""Inferences of several threads through one model, and through parts that models share."""

import copy
import threading
from collections import OrderedDict

import pytest
import torch
from cases import make_images, make_pair, needs_native

from densenet_efficient import fusion, inference
from densenet_efficient.kept import beside
from densenet_efficient.modules import DenseBlock, Features, Transition

pytestmark = [needs_native, pytest.mark.usefixtures("one_thread")]


def outputs_of(model, images):
    with torch.inference_mode():
        return model(images)


def test_threads_that_share_a_model():
    """Each gets the bits of a serial run, also where they all come first."""
    _, model = make_pair(mode="eval", dtype=torch.float32, growth_rate=16, num_init_features=32)
    images = [make_images(2, 3, 64, 64, seed=seed, dtype=torch.float32) for seed in range(8)]
    expected = [outputs_of(copy.deepcopy(model), x) for x in images]
    found = [None] * len(images)
    barrier = threading.Barrier(len(images))

    def run(index):
        barrier.wait()
        for _ in range(5):
            found[index] = outputs_of(model, images[index])

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(images))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


class Contested:
    """What is kept beside a block where another thread's stage takes the place of each that was looked at or put in."""

    def __init__(self, own, other):
        self.stages = [own, other]

    @property
    def stage(self):
        return self.stages.pop(0)

    @stage.setter
    def stage(self, stage):
        self.stages = self.stages[1:]


def test_threads_that_share_a_block_but_not_what_follows_it(monkeypatch):
    """Each runs the stage that it has checked or made, whatever the other keeps meanwhile."""
    block, images = DenseBlock(2, 6, growth_rate=4, bn_size=3).eval(), make_images(1, 6, 8, 8, dtype=torch.float32)
    consumers = [Transition(14, 5).eval(), Transition(14, 5).eval()]
    stages = []
    for consumer in consumers:
        outputs_of(Features(OrderedDict(block=block, transition=consumer)), images)
        stages.append(beside(block).stage)
    own, other = stages
    monkeypatch.setattr(inference, "beside", lambda _: Contested(own, other))
    assert inference.kept_stage(block, consumers[0]) is own
    made = inference.prepare_stage(block, block.read(), own.exit, images)
    assert made is not None and made.exit.consumer is consumers[0]


def double_a_convolution(model):
    layer = model.features.denseblock1.denselayer2
    layer.conv1 = copy.deepcopy(layer.conv1)
    with torch.no_grad():
        layer.conv1.weight *= 2


def double_a_transition(model):
    model.features.transition1.conv = copy.deepcopy(model.features.transition1.conv)
    with torch.no_grad():
        model.features.transition1.conv.weight *= 2


def double(module, arguments, output):
    return output * 2


def hook_a_layer(model):
    model.features.denseblock1.denselayer2.conv1.register_forward_hook(double)


def hook_a_block(model):
    model.features.denseblock1.register_forward_hook(double)


CHANGES = [double_a_convolution, double_a_transition, hook_a_layer, hook_a_block]


def call_once_after(monkeypatch, owner, name, change):
    """What another thread does while this one stands behind a call of ``owner.name``."""
    function, changes = getattr(owner, name), [change]

    def changing(*args, **kwargs):
        result = function(*args, **kwargs)
        if changes:
            changes.pop()()
        return result

    monkeypatch.setattr(owner, name, changing)


@pytest.mark.filterwarnings("ignore:a dense block runs layer by layer")
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize(
    ("owner", "name"), [(DenseBlock, "read"), (inference, "norms_of")], ids=["while it is read", "once it was read"]
)
def test_a_change_while_a_block_is_prepared(owner, name, change, monkeypatch):
    """The next inference is of the block as it is, whatever this one saw of the change."""
    naive, model = make_pair(mode="eval")
    images = make_images(2, 3, 64, 64)
    call_once_after(monkeypatch, owner, name, lambda: change(model))
    outputs_of(model, images)
    change(naive)
    torch.testing.assert_close(outputs_of(model, images), outputs_of(naive, images), rtol=1e-9, atol=1e-9)


def test_a_hook_while_a_classifier_is_cast(monkeypatch):
    classifier, images = torch.nn.Linear(3, 4), make_images(2, 3, dtype=torch.float32)
    call_once_after(monkeypatch, fusion, "is_observed", lambda: classifier.register_forward_hook(double))
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        inference.classify(classifier, images)
        torch.testing.assert_close(inference.classify(classifier, images), classifier(images), rtol=0, atol=0)
