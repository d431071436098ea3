"""Where a user's subclass or instance has a forward of its own, it is called, wherever the class stands."""

import types

import pytest
import torch
from cases import assert_close, make_images, make_pair, step
from conversion_cases import make_models
from torch import nn

from densenet_efficient import convert
from densenet_efficient.modules import Transition

pytestmark = pytest.mark.usefixtures("one_thread", "nan_memory")

IMAGES = (3, 3, 33, 47)
PLACES = ["features", "features.denseblock2", "features.transition1", "features.norm5", "features.norm0"]


def doubled_by_class(module):
    kind = type(module)
    module.__class__ = type("Twice", (kind,), {"forward": lambda self, x: 2 * kind.forward(self, x)})


def doubled_by_instance(module):
    kind = type(module)
    module.forward = types.MethodType(lambda self, x: 2 * kind.forward(self, x), module)


def with_forward(model, place, change):
    """Changed after a first step and an inference, of which something is kept."""
    model.eval()
    with torch.no_grad():
        model(make_images(*IMAGES))
    model.train()
    model(make_images(*IMAGES))
    change(model.get_submodule(place))


def assert_same(found, expected):
    images = make_images(*IMAGES)
    assert_close(step(found, images), step(expected, images))
    with torch.no_grad():
        assert_close(*({"": model.eval()(images)} for model in (found, expected)))


@pytest.mark.filterwarnings("ignore:a dense block runs layer by layer")
@pytest.mark.parametrize("change", [doubled_by_class, doubled_by_instance])
@pytest.mark.parametrize("place", PLACES)
def test_of_a_model(backend, place, change):
    naive, efficient = make_pair()
    for model in (naive, efficient):
        with_forward(model, place, change)
    assert_same(efficient, naive)


@pytest.mark.filterwarnings("ignore:a dense block runs layer by layer")
@pytest.mark.parametrize("change", [doubled_by_class, doubled_by_instance])
@pytest.mark.parametrize("place", PLACES)
def test_of_a_converted_model(backend, place, change):
    original, converted = make_models("torchvision")
    convert(converted)
    for model in (original, converted):
        with_forward(model, place, change)
    assert_same(converted, original)


@pytest.mark.parametrize("method", ["forward_features", "forward_head"])
def test_a_method_of_timm_set_on_a_converted_instance(backend, method):
    original, converted = make_models("timm")
    convert(converted)
    for model in (original, converted):
        theirs = getattr(model, method)
        setattr(model, method, lambda x, theirs=theirs: 2 * theirs(x))
    assert_same(converted, original)


def test_a_subclass_without_a_forward_of_its_own_stays_one_operator(backend):
    """Only what is changed is called."""
    naive, efficient = make_pair()
    efficient.features.transition1.__class__ = type("Named", (Transition,), {})
    efficient.features.__class__ = type("Named", (type(efficient.features),), {"extra": nn.Identity})
    assert_same(efficient, naive)
