"""A module that stands in a sequence twice runs twice, as nn.Sequential runs it, with the same weights."""

import pytest
import torch
from cases import LEVELS, MODES, assert_close, loss_of, make_images, make_pair, step
from timm.models.densenet import DenseNet
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from densenet_efficient import Backbone, convert, plan
from densenet_efficient.planning.shapes import blocks_of
from densenet_efficient.summary import minimum_size, summarize, total_costs

pytestmark = pytest.mark.usefixtures("one_thread", "nan_memory")

IMAGES = (3, 3, 33, 47)
# A transition halves 8 + 4 * 2 channels, so that the next block reads as many as the one before.
THREE_ALIKE = {"growth_rate": 2, "block_config": (4, 4, 4), "num_init_features": 8}


def tie_the_blocks(model):
    features = model.features
    features.transition2, features.denseblock2 = features.transition1, features.denseblock1


def tie_the_last_block(model):
    model.features.denseblock3 = model.features.denseblock1


def tie_all_blocks(model):
    tie_the_blocks(model)
    tie_the_last_block(model)


def tie_behind_an_observed_transition(model):
    """The block runs in a stage first, then by its own forward."""
    features = model.features
    features.denseblock2 = features.denseblock1
    features.transition2.conv.register_forward_hook(lambda *_: None)


def normalise_twice(model):
    model.features.add_module("norm6", model.features.norm5)


TIES = [tie_the_blocks, tie_the_last_block, tie_all_blocks, tie_behind_an_observed_transition, normalise_twice]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("mode", [*MODES, "mixed"])
@pytest.mark.parametrize("tie", TIES)
def test_what_comes_twice_runs_twice(backend, tie, mode, level):
    """Its running statistics are updated twice too, in order; an inference gives the same, also the second time."""
    pair = make_pair(mode=mode, checkpointing=level, **THREE_ALIKE)
    for model in pair:
        tie(model)
    for seed in range(2):
        images = make_images(*IMAGES, seed=seed)
        naive, efficient = (step(model, images) for model in pair)
        assert_close(efficient, naive)
        with torch.no_grad():
            assert_close(*({"": model(images), **dict(model.named_buffers())} for model in reversed(pair)))


@pytest.mark.parametrize("momentum", [None, 0.3], ids=str)
def test_the_statistics_of_a_norm_beside_its_stage(backend, momentum):
    """The norm of a stage's exit comes again by itself: it is updated in the order of its inputs."""
    pair = make_pair(compression=1.0, block_config=(3,))
    for model in pair:
        features = model.features
        features.norm5.momentum = momentum
        features.transition = nn.Sequential(
            features.norm5, nn.ReLU(), nn.Conv2d(18, 18, 1, bias=False).double(), nn.AvgPool2d(2)
        )
        del features.norm5
        features.norm5, features.norm6 = features.transition[0], features.transition[0]
    pair[1].load_state_dict(pair[0].state_dict())
    images = make_images(*IMAGES)
    naive, efficient = (step(model, images) for model in pair)
    assert_close(efficient, naive)
    assert pair[1].features.norm5.num_batches_tracked == 7 + 3


def test_a_relu_that_comes_again(backend):
    naive, efficient = (model.features for model in make_pair())
    for features in (naive, efficient):
        features.add_module("relu5", features.relu0)
    images = make_images(*IMAGES)
    assert_close({"": efficient(images)}, {"": naive(images)})


def test_a_compiled_model(backend):
    naive, efficient = make_pair(**THREE_ALIKE)
    for model in (naive, efficient):
        tie_the_blocks(model)
        normalise_twice(model)
    images = make_images(*IMAGES)
    compiled = step(torch.compile(efficient, fullgraph=True, backend="aot_eager"), images)
    torch._dynamo.reset()
    assert_close({name.removeprefix("_orig_mod."): value for name, value in compiled.items()}, step(naive, images))


def test_a_backbone(backend):
    naive, efficient = make_pair(**THREE_ALIKE)
    for model in (naive, efficient):
        tie_the_blocks(model)
    expected, x = {}, make_images(*IMAGES)
    for name, module in naive.features._modules.items():
        x = module(x)
        expected[name] = x.clone()  # a ReLU may follow in place
    maps = Backbone(efficient)(make_images(*IMAGES))
    assert_close(dict(maps), {name: expected[name] for name in maps})
    loss_of(maps["norm5"]).backward()


def test_the_intermediates_of_timm(backend):
    torch.manual_seed(0)
    model = DenseNet(growth_rate=4, block_config=(2, 2, 2), num_classes=5).double().eval()  # 8 channels each
    tie_the_blocks(model)
    results = []
    for _ in range(2):
        last, features = model.forward_intermediates(make_images(*IMAGES))
        results.append({str(index): feature for index, feature in enumerate([last, *features])})
        convert(model)
    assert_close(*reversed(results))


def test_the_summary_counts_work_twice_and_parameters_once():
    naive, efficient = make_pair(**THREE_ALIKE)
    for model in (naive, efficient):
        tie_the_blocks(model)
    costs = total_costs(summarize(efficient, IMAGES))
    assert costs.parameters == sum(parameter.numel() for parameter in efficient.parameters())
    with FlopCounterMode(display=False) as counter:
        naive(make_images(*IMAGES))
    assert 2 * costs.multiply_adds == counter.get_total_flops()
    assert minimum_size(efficient) == minimum_size(make_pair(**THREE_ALIKE)[1])


def test_a_plan_holds_weights_once():
    images, apart = (2, 3, 64, 64), make_pair(**THREE_ALIKE)[1]
    tied = make_pair(**THREE_ALIKE)[1]
    tie_the_blocks(tied)
    expected, found = plan(apart, images).training.memory, plan(tied, images).training.memory
    shared = [*apart.features.denseblock2.modules(), *apart.features.transition2.modules()]
    tensors = {tensor for module in shared for tensor in (*module.parameters(), *module.buffers())}
    sizes = [tensor.numel() * (4 if tensor.dim() else 8) for tensor in tensors]  # float32, but for the int64 counters
    assert expected.weights - found.weights == sum(sizes)
    assert found.saved_activations == expected.saved_activations


@pytest.mark.parametrize("levels", [*LEVELS, ["bottleneck", "bottleneck", "none"]], ids=str)
def test_levels_and_budgets_of_tied_blocks(backend, levels):
    naive, efficient = make_pair(**THREE_ALIKE)
    for model in (naive, efficient):
        tie_the_blocks(model)
    efficient.checkpointing = levels
    assert len(blocks_of(efficient)) == 3
    images = make_images(*IMAGES)
    assert_close(step(efficient, images), step(naive, images))
    assert efficient.set_memory_budget("1GiB", IMAGES, torch.float64).fits
    assert_close(step(efficient, images), step(naive, images))
