"""The classifier of an inference under autocast, whose weights are cast once."""

import copy

import pytest
import torch
from cases import make_images, make_pair, needs_native
from torch import nn

from densenet_efficient.kept import beside

pytestmark = [needs_native, pytest.mark.usefixtures("one_thread")]

CLASSIFIER_CHANGES = [
    lambda classifier: classifier.weight.add_(1),
    lambda classifier: classifier.bias.data.add_(1),
    lambda classifier: setattr(classifier, "weight", nn.Parameter(classifier.weight + 1)),
    lambda classifier: setattr(classifier, "bias", None),
    lambda classifier: classifier.half(),
    lambda classifier: classifier.register_forward_hook(lambda module, inputs, output: output + 1),
]


@pytest.mark.parametrize("change", [None, *CLASSIFIER_CHANGES])
def test_the_classifier_under_autocast(change):
    """Its weights are cast once, for as long as they are the same: to the same bits as by torch, each time."""
    _, model = make_pair(dtype=torch.float32, mode="eval")
    images = make_images(2, 3, 64, 64).float()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        model(images)
    with torch.no_grad():
        if change is not None:
            change(model.classifier)
    for dtype in (torch.bfloat16, torch.float16, torch.bfloat16):
        with torch.inference_mode(), torch.autocast("cpu", dtype):
            torch.testing.assert_close(model(images), model.classifier(model.features.pooled(images)), rtol=0, atol=0)
    with torch.autocast("cpu", torch.bfloat16):
        model(images).sum().backward()
    assert model.classifier.weight.grad is not None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_snapshot_sees_other_values_of_any_dtype(dtype):
    from densenet_efficient._C import ModuleSnapshot

    linear = nn.Linear(64, 64, dtype=dtype)
    snapshot = ModuleSnapshot([linear], with_values=True)
    linear.weight.data.add_(1)
    assert not snapshot.matches([linear])


def test_a_classifier_of_float64_is_refused_as_by_torch():
    """Autocast leaves float64 alone."""
    _, model = make_pair(dtype=torch.float32, mode="eval")
    model.classifier.double()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError, match="same dtype"):
        model(make_images(2, 3, 64, 64).float())


def test_the_classifier_is_cast_once(monkeypatch):
    _, model = make_pair(dtype=torch.float32, mode="eval")
    images = make_images(2, 3, 64, 64).float()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        expected = model(images)
        monkeypatch.setattr(nn.Linear, "forward", lambda *_: pytest.fail("the classifier ran as in training"))
        torch.testing.assert_close(model(images), expected, rtol=0, atol=0)
    assert beside(model.classifier).cast.weight.dtype == torch.bfloat16
    assert beside(copy.deepcopy(model).classifier).cast is None


class Doubling(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_a_classifier_of_another_class_has_its_own_forward():
    _, model = make_pair(dtype=torch.float32, mode="eval")
    images = make_images(2, 3, 64, 64).float()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        expected = 2 * model(images)
        model.classifier.__class__ = Doubling
        assert torch.equal(model(images), expected)
