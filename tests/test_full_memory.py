"""A memory that is full in the middle of a step: nothing is left half done, and a smaller batch then trains.

Every operator of torch and of ours that takes memory may be the one that finds none; here many are, in turn. What a
card does when its memory is full is tested in `test_gpu_training.py`.
"""

import pytest
import torch
from cases import LEVELS, loss_of, make_images, make_pair, norms_of, state_of
from torch.utils._python_dispatch import TorchDispatchMode

from densenet_efficient import operators

pytestmark = pytest.mark.usefixtures("one_thread")
# The Python functions of our operators, whose own calls a dispatch mode does not see otherwise.
BODIES = {
    operator._opoverload: operator._init_fn
    for operator in (operators.dense_stage, operators.dense_stage_backward, operators.stem, operators.stem_backward)
}
LARGE, SMALL = (4, 3, 33, 47), (2, 3, 32, 32)


class FullMemory(TorchDispatchMode):
    """The call number ``last`` of an operator raises what it raises where a memory is full."""

    def __init__(self, last):
        super().__init__()
        self.last, self.calls = last, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in BODIES:
            with self:
                return BODIES[function](*args, **kwargs or {})
        self.calls += not is_in_place(function)
        if self.calls == self.last and not is_in_place(function):
            raise torch.OutOfMemoryError(f"injected in {function}")
        return function(*args, **kwargs or {})


def is_in_place(function):
    """Of torch's own operators: they take no memory."""
    return function.namespace == "aten" and function._schema.name.endswith("_")


def make_model(level):
    return make_pair(dtype=torch.float32, checkpointing=level)[1]


def gradients_of(model, images):
    model.zero_grad()
    loss_of(model(images)).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def statistics_of(norm):
    return [norm.running_mean.clone(), norm.running_var.clone(), norm.num_batches_tracked.clone()]


def are_equal(ones, others):
    return all(torch.equal(one, other) for one, other in zip(ones, others, strict=True))


@pytest.mark.parametrize("level", LEVELS)
def test_a_step_fails_at_any_operator(native_backend, level):
    images, fewer = make_images(*LARGE, dtype=torch.float32), make_images(*SMALL, dtype=torch.float32)
    expected = gradients_of(make_model(level), fewer)
    model = make_model(level)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    untouched = [statistics_of(norm) for norm in norms_of(model)]
    whole = FullMemory(0)
    with whole:
        loss_of(model(images)).backward()
    updated = [statistics_of(norm) for norm in norms_of(model)]
    assert whole.calls > 200
    for last in range(1, whole.calls + 1, 3):
        model.load_state_dict(before)
        model.zero_grad()
        with pytest.raises(torch.OutOfMemoryError, match="injected"), FullMemory(last):
            loss_of(model(images)).backward()
        for norm, old, new in zip(norms_of(model), untouched, updated, strict=True):
            assert are_equal(statistics_of(norm), old) or are_equal(statistics_of(norm), new), last
        found = gradients_of(model, fewer)
        assert are_equal(found.values(), expected.values()), last
    assert state_of(model).keys() == state_of(make_model(level)).keys()
