"""The bottlenecks that "bottleneck" saves nevertheless: which they are, that they change no result, and when they are
not free."""

import copy

import pytest
import torch
from cases import assert_close, make_images, make_pair, saved_bytes, step

import densenet_efficient
from densenet_efficient import EfficientDenseNet, plan
from densenet_efficient.models import create_model
from densenet_efficient.planning.free_bottlenecks import saved_by_level, share_out, usual_shape
from densenet_efficient.planning.shapes import blocks_of
from densenet_efficient.planning.timeline import OPTIMIZERS, TrainingStep

ALL_RECOMPUTED = ["bottleneck"] * 4
NETWORK = {"growth_rate": 8, "block_config": (2, 3, 4), "num_init_features": 16, "num_classes": 5}
IMAGES = (2, 3, 64, 64)

pytestmark = pytest.mark.usefixtures("one_thread")


def on_meta(name, **arguments):
    with torch.device("meta"):
        return create_model(name, **arguments)


def free_in(model, device="cpu"):
    return [block.free_bottlenecks[device] for block in blocks_of(model)]


def peak_of(usual, levels, device, saved):
    return TrainingStep(usual, levels, OPTIMIZERS["sgd"], device, (), saved).activation_peak


def without_free_ones(model):
    copied = copy.deepcopy(model)
    for block in blocks_of(copied):
        block.free_bottlenecks = {}
    return copied


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", ["densenet121", "densenet161", "densenet201", "densenet264", "densenet-bc-100-12"])
def test_they_raise_no_peak_and_no_more_would_do_so(name, device):
    model = on_meta(name)
    usual = usual_shape(list(model.features.children()), device)
    levels = ALL_RECOMPUTED[: len(usual.blocks)]
    saved = share_out(usual, levels, device)
    assert saved == free_in(model, device) and sum(saved) > 0
    peak = peak_of(usual, levels, device, saved_by_level(usual, levels))
    assert peak_of(usual, levels, device, saved) == peak
    for index, block in enumerate(usual.blocks):
        more = [count + (index == other) for other, count in enumerate(saved)]
        assert saved[index] == block.layers or peak_of(usual, levels, device, more) > peak


def test_a_quarter_less_is_recomputed_of_densenet_121():
    model = on_meta("densenet121")
    assert free_in(model) == [0, 1, 17, 16]
    before, now = (
        TrainingStep(usual, ALL_RECOMPUTED, OPTIMIZERS["sgd"], "cpu", (), saved).recomputed
        for usual in [usual_shape(list(model.features.children()), "cpu")]
        for saved in ([0] * 4, free_in(model))
    )
    assert now < 0.75 * before


def test_they_follow_the_levels():
    model = EfficientDenseNet(**NETWORK)
    free = free_in(model)
    assert sum(free) > 0
    model.checkpointing = ["none", "bottleneck", "bottleneck"]
    assert free_in(model)[0] == 2  # all layers: its level
    model.checkpointing = "bottleneck"
    assert free_in(model) == free


def test_a_plan_knows_them():
    model = on_meta("densenet121")
    found = plan(model, (8, 3, 224, 224))
    for block in blocks_of(model):
        assert block.checkpointing == "bottleneck"
    bottleneck = 8 * 7 * 7 * 128 * 4
    last = next(stage for stage in found.stages if stage.name == "denseblock4")
    assert last.own.saved_activations == 8 * 7 * 7 * 1024 * 4 + 16 * bottleneck
    assert found.training.moment == "denseblock1, backward"


@pytest.mark.parametrize("saved", [(1, 0), (2, 1), (0, 2), (3, 2)], ids=str)
@pytest.mark.parametrize("block_config", [(3, 2), (5, 3)], ids=str)  # the second recomputes in room and in parts
def test_they_change_no_result(backend, saved, block_config):
    _, model = make_pair(block_config=block_config, num_init_features=4, checkpointing="bottleneck")
    chosen = copy.deepcopy(model)
    for block, count in zip(blocks_of(chosen), saved, strict=True):
        block.free_bottlenecks = {"cpu": count}
    images = make_images(5, 3, 33, 47)
    assert_close(step(chosen, images), step(without_free_ones(model), images), tolerance=1e-13)


def test_a_step_keeps_them():
    model = EfficientDenseNet(**NETWORK)
    sides, width = (16, 8, 4), 32
    expected = sum(count * IMAGES[0] * side**2 * width * 4 for count, side in zip(free_in(model), sides, strict=True))
    images = torch.rand(IMAGES)
    difference = saved_bytes(model, images) - saved_bytes(without_free_ones(model), images)
    assert difference == expected > 0


def features_alone(model, images):
    return model.features, images


def through_a_hook(model, images):
    model.features.register_forward_hook(lambda *_: None)
    return model, images


def with_a_frozen_stem(model, images):
    model.features[:4].requires_grad_(False)
    return model, images


def with_a_frozen_block(model, images):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("denseblock2" in name or "denseblock3" in name or "classifier" in name)
    return model, images


def last_block_by_itself(model, images):
    block = model.features.denseblock3
    return block, torch.rand(2, block.denselayer1.norm1.num_features, 4, 4)


@pytest.mark.parametrize(
    "part",
    [features_alone, through_a_hook, with_a_frozen_stem, with_a_frozen_block, last_block_by_itself],
    ids=lambda f: f.__name__,
)
def test_what_may_not_end_the_step_keeps_none(part):
    """Where more follows than a classifier, or the backward ends early, another moment may be the peak."""
    model, images = EfficientDenseNet(**NETWORK), torch.rand(IMAGES)
    assert sum(free_in(model)) > 0
    other = without_free_ones(model)
    saved, expected = (saved_bytes(*part(network, images)) for network in (model, other))
    assert saved == expected > 0


def test_a_block_with_fewer_layers_than_were_counted(backend):
    pair = make_pair(**NETWORK, checkpointing="bottleneck")
    assert free_in(pair[1])[2] == 4
    for model in pair:
        del model.features.denseblock3["denselayer4"]
        channels = model.features.norm5.num_features - NETWORK["growth_rate"]
        model.features.norm5 = torch.nn.BatchNorm2d(channels).double()
        model.classifier = torch.nn.Linear(channels, 5).double()
    pair[1].load_state_dict(pair[0].state_dict())
    images = make_images(*IMAGES)
    naive, efficient = (step(model, images) for model in pair)
    assert_close(efficient, naive)


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_a_converted_network_has_the_same(library):
    models = pytest.importorskip(f"{library}.models")
    with torch.device("meta"):
        converted = models.densenet121()
    densenet_efficient.convert(converted)
    assert free_in(converted) == free_in(on_meta("densenet121"))
    densenet_efficient.convert(converted, "none")
    assert free_in(converted) == [6, 12, 24, 16]
    densenet_efficient.revert(converted)
    assert not any("free_bottlenecks" in vars(module) for module in converted.modules())


def test_nothing_is_free_beside_what_is_not_known():
    model = on_meta("densenet121")
    model.features.transition2 = torch.nn.Sequential(model.features.transition2, torch.nn.Identity())
    model.checkpointing = "bottleneck"
    assert not any(block.free_bottlenecks for block in blocks_of(model))


@pytest.mark.parametrize("dims", [1, 3])
def test_nothing_is_free_in_other_dimensions(dims):
    """Measured: there the peaks lie elsewhere, and keeping more raises them."""
    model = EfficientDenseNet(**NETWORK, spatial_dims=dims)
    blocks = [module for module in model.features if isinstance(module, densenet_efficient.DenseBlock)]
    assert len(blocks) == 3 and not any(block.free_bottlenecks for block in blocks)


@pytest.mark.parametrize(
    "features", [[], [torch.nn.Identity()], [torch.nn.Conv2d(3, 8, 3)]], ids=["none", "one", "conv"]
)
def test_nothing_is_known_of_other_networks(features):
    assert usual_shape(features, "cpu") is None
    stages = list(EfficientDenseNet(**NETWORK).features)[1:]  # that begins with no convolution
    assert usual_shape([*features, *stages], "cpu") is None
