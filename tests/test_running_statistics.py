"""Running statistics that are missing, switched on late or shared: what torch's batch norms do with them."""

import pytest
import torch
from cases import LEVELS, MODES, assert_close, loss_of, make_images, make_pair, needs_native, norms_of, set_mode, step
from torch import nn

pytestmark = pytest.mark.usefixtures("one_thread", "nan_memory")

IMAGES = (3, 3, 33, 47)
BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


def assert_same_steps(pair, steps=2):
    for seed in range(steps):
        images = make_images(*IMAGES, seed=seed)
        naive, efficient = (step(model, images) for model in pair)
        assert_close(efficient, naive)


@pytest.mark.parametrize("counter", [None, torch.tensor(3)], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_tracking_switched_on_without_statistics(backend, mode, counter):
    """torch normalises by the batch, and updates but a counter."""
    pair = make_pair(mode=mode)
    for model in pair:
        for norm in norms_of(model)[::2]:
            norm.running_mean = norm.running_var = None
            norm.num_batches_tracked = None if counter is None else counter.clone()
    assert_same_steps(pair)


def test_tracking_switched_off_leaves_the_statistics(backend):
    pair = make_pair()
    for model in pair:
        for norm in norms_of(model)[::2]:
            norm.track_running_stats = False
    assert_same_steps(pair)


@pytest.mark.parametrize("momentum", [None, 0.3], ids=str)
def test_without_a_counter(backend, momentum):
    """The cumulative average, of a number of batches that is not known, stays as it is."""
    pair = make_pair()
    for model in pair:
        for norm in norms_of(model)[::2]:
            norm.num_batches_tracked, norm.momentum = None, momentum
    assert_same_steps(pair)


@pytest.mark.parametrize(
    "path",
    ["norm0", "denseblock1.denselayer2.norm2", "denseblock2.denselayer1.norm1", "transition1.norm", "norm5"],
)
@pytest.mark.parametrize(("mode", "trains"), [("frozen", True), ("train", False)])
def test_one_norm_unlike_all_others(backend, path, mode, trains):
    pair = make_pair(mode=mode)
    for model in pair:
        model.features.get_submodule(path).train(trains)
    assert_same_steps(pair)


@pytest.mark.parametrize("momentum", [None, 0.3], ids=str)
@pytest.mark.parametrize("level", LEVELS)
def test_a_norm_that_layers_share_is_updated_by_each(backend, level, momentum):
    pair = make_pair(checkpointing=level)
    for model in pair:
        block = model.features.denseblock1
        block.denselayer3.norm2 = block.denselayer1.norm2
        block.denselayer1.norm2.momentum = momentum
    assert_same_steps(pair)
    assert pair[1].features.denseblock1.denselayer1.norm2.num_batches_tracked == 7 + 2 * 2


@pytest.mark.parametrize("shared", [BUFFERS, BUFFERS[2:]], ids=["all", "the counter"])
def test_norms_that_share_their_buffers_alone(backend, shared):
    pair = make_pair()
    for model in pair:
        block = model.features.denseblock1
        for name in shared:
            setattr(block.denselayer2.norm2, name, getattr(block.denselayer1.norm2, name))
    assert_same_steps(pair)


def test_a_shared_norm_in_a_compiled_model(backend):
    _, model = make_pair()
    block = model.features.denseblock1
    block.denselayer2.norm2 = block.denselayer1.norm2
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    step(compiled, make_images(*IMAGES))
    torch._dynamo.reset()
    assert block.denselayer1.norm2.num_batches_tracked == 7 + 2


@pytest.mark.filterwarnings("ignore:a dense block runs layer by layer")
@pytest.mark.parametrize("path", ["norm0", "denseblock1.denselayer2.norm1", "transition1.norm", "norm5"])
@pytest.mark.parametrize("missing", ["running_mean", "running_var"])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_one_statistic_without_the_other_is_refused_as_by_torch(backend, path, missing, mode):
    errors = []
    for model in make_pair(mode=mode):
        setattr(model.features.get_submodule(path), missing, None)
        with pytest.raises((RuntimeError, ValueError)) as error, torch.set_grad_enabled(mode == "train"):
            model(make_images(*IMAGES))
        errors.append((error.type, str(error.value)))
    assert errors[0] == errors[1]


PARTS = ["norm0", "denseblock1.denselayer2.norm1", "denseblock1.denselayer2.norm2", "transition1.norm", "norm5"]


@pytest.mark.filterwarnings("ignore:a dense block runs layer by layer")
@pytest.mark.parametrize("path", PARTS)
@pytest.mark.parametrize("missing", ["weight", "bias"])
def test_a_norm_without_gamma_or_beta(backend, path, missing):
    """Whatever it was made with; also where an inference was prepared before."""
    pair = make_pair()
    images = make_images(*IMAGES)
    for model in pair:
        with torch.no_grad():
            set_mode(model, "eval")(images)
        norm = set_mode(model, "train").features.get_submodule(path)
        setattr(norm, missing, None)
        assert isinstance(norm, nn.BatchNorm2d) and norm.affine
    assert_same_steps(pair)
    with torch.no_grad():
        assert_close(*({"": set_mode(model, "eval")(images)} for model in pair))


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("level", LEVELS)
def test_a_forward_in_training_before_the_backward_of_one_in_evaluation(backend, level, mode):
    """The gradients are those of the statistics that the forward in evaluation found."""
    _, expected = make_pair(mode="eval", checkpointing=level)
    _, model = make_pair(mode="eval", checkpointing=level)
    images, others = (make_images(*IMAGES, seed=seed) for seed in range(2))
    step(expected, images)
    loss = loss_of(model(images))
    model.train(mode == "train")
    model(others)
    loss.backward()
    assert_close(
        {name: p.grad for name, p in model.named_parameters()},
        {name: p.grad for name, p in expected.named_parameters()},
    )


@needs_native
@pytest.mark.parametrize("path", ["denseblock2.denselayer1.norm1", "norm5"])
def test_one_statistic_made_in_inference_mode(path):
    """It tells nobody when it changes, so nothing of its stage is kept: also one element shows."""
    naive, efficient = make_pair(mode="eval")
    images = make_images(*IMAGES)
    with torch.inference_mode():
        for model in (naive, efficient):
            norm = model.features.get_submodule(path)
            norm.running_mean = norm.running_mean.clone()
        for change in (0.0, 10.0, -20.0):
            for model in (naive, efficient):
                model.features.get_submodule(path).running_mean[7] += change
            assert_close({"": efficient(images)}, {"": naive(images)})
