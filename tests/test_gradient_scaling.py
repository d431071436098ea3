"""float16 under autocast with a gradient scaler: a step that overflows is skipped, as it is by the naive model."""

import copy
import statistics

import pytest
import torch
from cases import LEVELS, group_errors, loss_of, make_images, make_pair
from torch.nn.utils import clip_grad_norm_

pytestmark = pytest.mark.usefixtures("one_thread")
SEEDS = range(3)
TOO_LARGE, FITTING = 2.0**40, 2.0**8  # scales: of the first, float16 has no gradient


class Training:
    """A model as a person trains it in float16; with ``scaled=False`` as it is."""

    def __init__(self, model, scaled=True):
        self.model = model
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        factors = {"init_scale": TOO_LARGE, "backoff_factor": FITTING / TOO_LARGE}
        self.scaler = torch.amp.GradScaler("cpu", enabled=scaled, **factors)

    def step(self, images):
        self.optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16, enabled=self.scaler.is_enabled()):
            loss = loss_of(self.model(images))
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        clip_grad_norm_(self.model.parameters(), 10.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def weights(self):
        return {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}


def errors_of(level, steps, results):
    """Median errors of the (naive, efficient) model against float64, by group; what to compare is for ``results``."""
    errors = []
    for seed in SEEDS:
        naive, efficient = make_pair(seed, torch.float32, checkpointing=level, small_inputs=True)
        truth = Training(copy.deepcopy(naive).double(), scaled=False)
        trainings = [Training(model) for model in (naive, efficient)]
        images = make_images(3, 3, 16, 12, seed=seed, dtype=torch.float32)
        steps(truth, trainings, images)
        expected = results(truth)
        errors.append([group_errors(results(training), expected) for training in trainings])
    return {
        group: [statistics.median(pair[index][group] for pair in errors) for index in (0, 1)] for group in errors[0][0]
    }


def buffers(training):
    return dict(training.model.named_buffers())


def skipped_step(truth, trainings, images):
    truth.model(images.double())
    for training in trainings:
        before = training.weights()
        training.step(images)
        assert training.scaler.get_scale() == FITTING
        assert all(torch.equal(value, before[name]) for name, value in training.weights().items())
        assert not training.optimizer.state
    tracked = [[v for name, v in buffers(each).items() if name.endswith("tracked")] for each in (truth, *trainings)]
    assert tracked[0] == tracked[1] == tracked[2] and len(tracked[0]) > 5


@pytest.mark.parametrize("level", LEVELS)
def test_a_step_that_overflows_leaves_weights_alone_and_updates_statistics_once(backend, level):
    errors = errors_of(level, skipped_step, buffers)
    assert set(errors) == {"means", "variances"}
    for group, (naive, efficient) in errors.items():
        assert efficient <= 2 * naive, group


def skipped_step_then_others(truth, trainings, images):
    skipped_step(truth, trainings, images)
    for training in (truth, *trainings):
        training.before = training.weights()
        for _ in range(2):
            training.step(images.to(next(training.model.parameters()).dtype))
    assert all(training.scaler.get_scale() == FITTING for training in trainings)


def changes_and_buffers(training):
    changes = {f"{name}.grad": value - training.before[name] for name, value in training.weights().items()}
    return changes | buffers(training)


@pytest.mark.parametrize("level", LEVELS)
def test_the_steps_after_it_are_taken(backend, level):
    errors = errors_of(level, skipped_step_then_others, changes_and_buffers)
    assert set(errors) == {"gradients", "means", "variances"}
    for group, (naive, efficient) in errors.items():
        assert efficient <= 2 * naive, group
