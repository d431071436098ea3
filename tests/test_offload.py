"""Storages that leave and come back: the same bits, in the right order, with nothing held; copies by a lane of the CPU.

On a GPU, with streams: test_gpu_training.py.
"""

from __future__ import annotations

import gc
import weakref
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from cases import LEVELS, VARIANTS, assert_close, loss_of, make_images, make_pair, step

from densenet_efficient import offload, operator_calls


class LaneOfTheCPU:
    """Copies at once, and writes down what is asked of it."""

    def __init__(self):
        self.asked = []
        self.storages = []  # weakly

    def to_host(self, tensor):
        self.asked.append(("leave", tensor.shape[1]))
        self.storages.append(weakref.ref(tensor.untyped_storage()))
        return tensor.clone()

    def to_device(self, host):
        self.asked.append(("come", host.shape[1]))
        return host.clone(), host.shape[1]

    def wait(self, complete):
        self.asked.append(("wait", complete))


@pytest.fixture
def lane(monkeypatch):
    """Every stage offloads, as it would on a GPU."""
    lane = LaneOfTheCPU()
    monkeypatch.setattr(offload, "lane_of", lambda device: lane)
    monkeypatch.setattr(operator_calls, "offloaded", lambda wanted, x, parameters: offload.leaving(x, parameters))
    return lane


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_results_have_the_same_bits(request, variant, level):
    arguments = VARIANTS[variant] | {"checkpointing": level, "drop_rate": 0.2}
    results = []
    for name in (None, "lane"):
        if name is not None:
            lane = request.getfixturevalue(name)
        model = make_pair(**arguments)[1]
        results.append(step(model, make_images(2, 3, 32, 32), seed=1))
    assert_close(*results, tolerance=0)
    assert [what for what, _ in lane.asked].count("leave") == 2


def test_parameters_of_the_images_shape_stay(lane):
    """The last block's 1x1 convolutions, weights [12, C, 1, 1], beside its storage of twelve images of one pixel."""
    model = make_pair(block_config=(2, 2), compression=1.0, num_init_features=4)[1]
    assert model.features.denseblock2.denselayer1.conv1.weight.shape == (12, 12, 1, 1)
    step(model, make_images(12, 3, 8, 8))
    assert [channels for what, channels in lane.asked if what == "leave"] == [12, 20]


def test_the_storage_before_comes_while_one_is_used(lane):
    model = make_pair(block_config=(2, 2, 2), compression=1.0, num_init_features=4)[1]
    first, second, third = 12, 20, 28  # channels of the storages
    step(model, make_images(2, 3, 64, 64))
    assert lane.asked == [
        *(("leave", storage) for storage in (first, second, third)),
        *(("come", third), ("wait", third), ("come", second)),
        *(("wait", second), ("come", first)),
        ("wait", first),
    ]


def test_the_storage_before_is_called_when_one_is_taken(lane):
    """And the one that was taken is its user's alone."""
    first, second = (offload._Away(torch.randn(2, channels, 1, 1)) for channels in (3, 5))
    assert second.take().shape == (2, 5, 1, 1)
    assert lane.asked[2:] == [("come", 5), ("wait", 5), ("come", 3)]
    assert first.coming is not None and second.coming is None


def test_a_storage_keeps_none_that_left_before_it(lane):
    """As that of a step whose loss nobody needed."""
    first, second = (offload._Away(torch.randn(2, channels, 1, 1)) for channels in (3, 5))
    gone = weakref.ref(first)
    del first
    gc.collect()
    assert gone() is None
    second.take()
    assert lane.asked[2:] == [("come", 5), ("wait", 5)]


def test_a_device_has_one_lane(monkeypatch):
    monkeypatch.setattr(offload, "Lane", lambda device: SimpleNamespace(device=device))
    monkeypatch.setattr(offload, "_lanes", {})
    first, second = torch.device("cuda", 0), torch.device("cuda", 1)
    assert offload.lane_of(first) is offload.lane_of(torch.device("cuda", 0)) is not offload.lane_of(second)


def test_between_forward_and_backward_nothing_else_holds_a_storage(lane):
    model = make_pair()[1]
    logits = model(make_images(2, 3, 32, 32))
    gc.collect()
    assert len(lane.storages) == 2 and all(storage() is None for storage in lane.storages)
    loss_of(logits).backward()


def test_a_graph_may_run_backward_twice(lane):
    model = make_pair()[1]
    loss = loss_of(model(make_images(2, 3, 32, 32)))
    loss.backward(retain_graph=True)
    once = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    loss.backward()
    twice = {name: parameter.grad / 2 for name, parameter in model.named_parameters()}
    assert_close(twice, once, tolerance=0)


def test_an_earlier_graph_is_not_called_again(lane):
    model = make_pair()[1]
    earlier = loss_of(model(make_images(2, 3, 32, 32)))
    earlier.backward(retain_graph=True)
    lane.asked.clear()
    step(model, make_images(2, 3, 32, 32))
    assert [what for what, _ in lane.asked].count("come") == 2


@pytest.mark.parametrize("wanted", [True, False])
def test_on_a_gpu_what_is_wanted_leaves(monkeypatch, wanted):
    monkeypatch.setattr("torch.cuda.is_current_stream_capturing", lambda: False)
    on_a_gpu = SimpleNamespace(device=torch.device("cuda"), shape=(2, 3, 4, 4))
    context = offload.offloaded(wanted, on_a_gpu, [])
    assert isinstance(context, torch.autograd.graph.saved_tensors_hooks) == wanted
    with torch.no_grad():
        assert isinstance(offload.offloaded(wanted, on_a_gpu, []), nullcontext)


@pytest.mark.parametrize("recorder", ["torch.compiler.is_compiling", "torch.cuda.is_current_stream_capturing"])
def test_a_graph_cannot_offload(monkeypatch, recorder):
    monkeypatch.setattr(recorder, lambda: True)
    on_a_gpu = SimpleNamespace(device=torch.device("cuda"))
    with pytest.raises(RuntimeError, match="remedy: set_memory_budget without offload"):
        offload.offloaded(True, on_a_gpu, [])


def test_on_the_cpu_a_storage_is_where_it_would_go():
    model = make_pair()[1]
    expected = step(model, make_images(2, 3, 32, 32))
    model = make_pair()[1]
    for block in (model.features.denseblock1, model.features.denseblock2):
        block.offload = True
    assert_close(step(model, make_images(2, 3, 32, 32)), expected, tolerance=0)
    assert not offload._lanes


def test_what_is_saved_keeps_no_input_alive():
    """Of its images the hooks keep the number and the size; torch keeps the hooks with what is saved."""
    x = torch.randn(2, 3, 4, 4)
    gone = weakref.ref(x)
    hooks = offload.leaving(x, [])
    del x
    assert gone() is None
    assert isinstance(hooks, torch.autograd.graph.saved_tensors_hooks)
