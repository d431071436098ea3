"""What was read of a block's layers serves again, until a module, a setting or a hook is another."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from cases import needs_native
from torch import nn

from densenet_efficient import DenseBlock
from densenet_efficient.readings import read_once

pytestmark = needs_native  # which keeps a reading


def block_of_three() -> DenseBlock:
    return DenseBlock(3, 8, growth_rate=4, drop_rate=0.5)


def observe(module: nn.Module) -> None:
    module.register_forward_hook(lambda *_: None)


CHANGES = {
    "a hook of a layer": lambda block: observe(block.denselayer2),
    "a hook of a norm": lambda block: observe(block.denselayer2.norm1),
    "a backward hook": lambda block: block.denselayer3.conv2.register_full_backward_pre_hook(lambda *_: None),
    "a forward of its own": lambda block: setattr(block.denselayer1, "forward", block.denselayer1.forward),
    "another module": lambda block: setattr(block.denselayer3, "relu1", nn.SiLU()),
    "another class": lambda block: setattr(block.denselayer1.norm1, "__class__", nn.LazyBatchNorm2d),
    "a bias": lambda block: setattr(block.denselayer2.conv1, "bias", nn.Parameter(torch.zeros(16))),
    "another geometry": lambda block: setattr(block.denselayer2.conv2, "stride", (2, 2)),
    "another rate": lambda block: [setattr(layer, "drop_rate", 0.25) for layer in block.values()],
    "evaluation": lambda block: block.eval(),
    "a layer less": lambda block: block.pop("denselayer3"),
    "no layer": lambda block: block.clear(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_read(change):
    block = block_of_three()
    before = read_once(block)
    CHANGES[change](block)
    assert read_once(block) == block.read() != before


@pytest.mark.parametrize("change", ["a hook of a layer", "another module"])
def test_what_is_taken_back_is_read_again(change):
    block = block_of_three()
    before, layers = read_once(block), copy.copy(block._modules)
    CHANGES[change](block)
    assert isinstance(read_once(block), str)
    block.denselayer2._forward_hooks.clear()
    block.denselayer3.relu1 = nn.ReLU()
    assert block._modules == layers and read_once(block) == before


def test_values_do_not_count():
    block = block_of_three()
    layers = read_once(block)
    with torch.no_grad():
        block.denselayer1.conv1.weight.add_(1)
    block.load_state_dict(block_of_three().state_dict(), assign=True)
    block.requires_grad_(False).double()
    assert read_once(block) is layers


def test_tensors_in_the_place_of_parameters_are_let_go():
    block, x = block_of_three(), torch.randn(2, 8, 5, 5)
    other = {name: value.detach().clone() for name, value in block.state_dict().items()}
    kept = weakref.ref(other["denselayer1.conv1.weight"])
    torch.func.functional_call(block, other, (x,))
    del other
    gc.collect()
    assert kept() is None


def test_modules_that_can_no_longer_be_read_are_let_go():
    block = block_of_three()
    read_once(block)
    gone = weakref.ref(block.denselayer3.conv2)
    block.denselayer3.conv2 = nn.Identity()
    assert isinstance(read_once(block), str)
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("place", [nn.Module.register_buffer, setattr], ids=["a buffer", "an attribute"])
def test_a_weight_that_is_no_parameter_is_read(place):
    block, x = block_of_three().eval(), torch.randn(2, 8, 5, 5)
    expected = block(x)
    conv = block.denselayer2.conv1
    weight = conv._parameters.pop("weight").data
    place(conv, "weight", weight)
    assert torch.equal(block(x), expected)
    layers = read_once(block)
    assert read_once(block) is layers != isinstance(layers, str)
    conv.weight = weight[:4]
    assert isinstance(read_once(block), str)


def test_a_global_hook_is_read():
    block = block_of_three()
    read_once(block)
    hook = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert isinstance(read_once(block), str)
    finally:
        hook.remove()


def test_a_copy_is_read_by_itself():
    block = block_of_three()
    layers = read_once(block)
    twin = copy.deepcopy(block)
    assert read_once(twin) == twin.read() != layers


def test_a_block_is_let_go():
    block = block_of_three()
    read_once(block)
    gone = weakref.ref(block)
    del block
    gc.collect()
    assert gone() is None
