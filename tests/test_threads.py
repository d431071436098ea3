"""Inferences of several threads through one model, and through parts that models share."""

import copy
import threading
from collections import OrderedDict

import pytest
import torch
from cases import make_images, make_pair, needs_native

from densenet_efficient import inference
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
