"""A memory that is full in the middle of a step: nothing is left half done, and a smaller batch then trains.

Every operator of torch and of ours that takes memory may be the one that finds none; here many are, in turn. What a
card does when its memory is full is tested in `test_gpu_training.py`.
"""

import copy

import pytest
import torch
from cases import LEVELS, loss_of, make_images, make_pair, norms_of
from torch.utils._python_dispatch import TorchDispatchMode

from densenet_efficient import operators

pytestmark = pytest.mark.usefixtures("one_thread")
# The Python functions of our operators, whose own calls a dispatch mode does not see otherwise.
BODIES = {
    operators.dense_stage: operators.compute_stage,
    operators.dense_stage_backward: operators.compute_stage_backward,
    operators.stem: operators.compute_stem,
    operators.stem_backward: operators.compute_stem_backward,
}
LARGE, SMALL = (4, 3, 33, 47), (2, 3, 32, 32)
ATTEMPTS = 60  # at least, spread over a step


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


def make_training(level):
    """A model, and an optimizer that has state."""
    model = make_pair(dtype=torch.float32, checkpointing=level)[1]
    return model, torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)


def train(model, optimizer, images):
    optimizer.zero_grad()
    loss_of(model(images)).backward()
    optimizer.step()


def trained(model, optimizer):
    """What training changes, but for the norms' statistics."""
    momenta = [optimizer.state[parameter]["momentum_buffer"] for parameter in model.parameters()]
    return [tensor.detach().clone() for tensor in (*model.parameters(), *momenta)]


def statistics_of(norm):
    return [norm.running_mean.clone(), norm.running_var.clone(), norm.num_batches_tracked.clone()]


def are_equal(ones, others):
    return all(torch.equal(one, other) for one, other in zip(ones, others, strict=True))


@pytest.mark.parametrize("level", LEVELS)
def test_a_step_fails_at_any_operator(backend, level):
    """Each norm is updated once or not at all; model and optimizer then train on a smaller batch as if nothing was."""
    images, fewer = make_images(*LARGE, dtype=torch.float32), make_images(*SMALL, dtype=torch.float32)
    model, optimizer = make_training(level)
    train(model, optimizer, fewer)  # from here on the optimizer has momentum
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    untouched = [statistics_of(norm) for norm in norms_of(model)]
    train(model, optimizer, fewer)
    expected = trained(model, optimizer)
    model.load_state_dict(before[0])
    whole = FullMemory(0)
    with whole:
        loss_of(model(images)).backward()
    updated = [statistics_of(norm) for norm in norms_of(model)]
    assert whole.calls > 2 * ATTEMPTS
    for last in range(1, whole.calls + 1, whole.calls // ATTEMPTS):
        model.load_state_dict(before[0])
        optimizer.load_state_dict(copy.deepcopy(before[1]))
        optimizer.zero_grad()
        with pytest.raises(torch.OutOfMemoryError, match="injected"), FullMemory(last):
            loss_of(model(images)).backward()
        for norm, old, new in zip(norms_of(model), untouched, updated, strict=True):
            assert are_equal(statistics_of(norm), old) or are_equal(statistics_of(norm), new), last
        train(model, optimizer, fewer)
        assert are_equal(trained(model, optimizer), expected), last
