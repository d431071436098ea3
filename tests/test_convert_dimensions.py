"""`convert` on DenseNets of one and three dimensions, MONAI's and handwritten ones: the same results, a tenth saved."""

import copy
import pickle
import re

import pytest
import torch
from cases import (
    LEVELS,
    MODES,
    assert_close,
    group_errors,
    make_images,
    randomise,
    saved_bytes,
    set_mode,
    step,
    trained,
)
from conversion_cases import monai_densenet2d as monai_densenet
from handwritten_densenets import (
    AdaptableBlock,
    EvaluationBlock,
    FailingBlock,
    HandwrittenDenseNet,
    LateBlock,
    ListBlock,
    ResidualBlock,
    TupleBlock,
)
from monai.data import MetaTensor
from monai.networks import nets
from test_convert import blocks_of, classes_of, seeded
from test_exactness import assert_errors_at_most_twice, low_precision_step

from densenet_efficient import EfficientDenseNet, convert, load_weights, revert
from densenet_efficient.reference import NaiveDenseNet

pytestmark = pytest.mark.usefixtures("one_thread", "nan_memory")

SIZES = {1: (70,), 2: (33, 47), 3: (9, 19, 17)}
SMALL = {"growth_rate": 4, "block_config": (3, 2), "num_init_features": 6, "bn_size": 3, "num_classes": 5}
MODELS = {
    "MONAI 1D": (1, lambda: monai_densenet(1)),
    "MONAI 1D dropout": (1, lambda: monai_densenet(1, dropout_prob=0.3)),
    "MONAI 3D": (3, lambda: monai_densenet(3)),
    "MONAI 3D dropout": (3, lambda: monai_densenet(3, dropout_prob=0.3)),
    "handwritten 1D": (1, lambda: HandwrittenDenseNet(1)),
    "handwritten 2D": (2, lambda: HandwrittenDenseNet(2)),
    "handwritten 3D": (3, HandwrittenDenseNet),
    "handwritten 3D dropout": (3, lambda: HandwrittenDenseNet(drop_rate=0.3)),
    "handwritten, checkpointed": (3, lambda: HandwrittenDenseNet(block=ListBlock)),
    "naive": (2, lambda: NaiveDenseNet(**SMALL)),
}
every_model = pytest.mark.parametrize("name", MODELS)


def make_models(name, mode="train", seed=0):
    """(the original, one to convert), equal, and images for them."""
    dims, make = MODELS[name]
    torch.manual_seed(seed)
    model = make()
    randomise(model, seed)
    model = set_mode(model.double(), mode)
    return copy.deepcopy(model), model, make_images(3, 3, *SIZES[dims], seed=seed)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_images_of_monais_loader(backend, dims):
    """They are tensors of its own class, and stay so."""
    original, converted = (monai_densenet(dims).double() for _ in range(2))
    converted.load_state_dict(original.state_dict())
    convert(converted)
    images = MetaTensor(make_images(2, 3, *SIZES[dims]))
    assert_close(step(converted, images), step(original, images))
    with torch.no_grad():
        assert_close({"": converted.eval()(images)}, {"": original.eval()(images)})
        assert type(converted(images)) is type(original(images)) is MetaTensor


@every_model
@pytest.mark.parametrize("level", LEVELS)
def test_trains_like_the_original(backend, name, level):
    """Changes of the parameters, and buffers with num_batches_tracked, after three steps of SGD."""
    original, converted, images = make_models(name)
    report = convert(converted, checkpointing=level)
    assert len(blocks_of(converted)) == 2, report
    if "checkpointed" in name:
        set_mode(original, "frozen")
        set_mode(converted, "frozen")
    results = [trained(seeded(model), images) for model in (converted, original)]
    assert_close(*results)


@every_model
@pytest.mark.parametrize("mode", MODES)
def test_outputs_and_gradients(backend, name, mode):
    original, converted, images = make_models(name, mode)
    convert(converted)
    results = [step(model, images, seed=3) for model in (converted, original)]
    if "checkpointed" in name:  # theirs updates the running statistics twice: pytorch/pytorch#96136
        buffers = dict(original.named_buffers())
        results = [{key: value for key, value in result.items() if key not in buffers} for result in results]
    assert_close(*results)


@pytest.mark.parametrize("name", ["MONAI 1D dropout", "MONAI 3D dropout"])
def test_dropouts_that_train_by_themselves(backend, name):
    """As for Monte Carlo dropout."""
    original, converted, images = make_models(name, "eval")
    convert(converted)
    for model in map(seeded, (original, converted)):
        for module in model.modules():
            if isinstance(module, torch.nn.modules.dropout._DropoutNd):
                module.train()
    assert_close(*({"": model(images).detach()} for model in (converted, original)))


@pytest.mark.parametrize("name", ["MONAI 1D", "MONAI 3D"])
@pytest.mark.parametrize("level", LEVELS)
def test_float32(backend, name, level):
    """At most twice the original's own error."""
    errors = []
    for seed in range(5):
        original, converted, images = make_models(name, seed=seed)
        convert(converted, checkpointing=level)
        truth = step(copy.deepcopy(original), images)
        errors.append(
            [
                group_errors(low_precision_step(model, images, torch.float32, False), truth)
                for model in (original, converted)
            ]
        )
    assert_errors_at_most_twice(errors, 1e-5)


@every_model
def test_report_and_revert(name):
    original, converted, images = make_models(name)
    report = convert(converted)
    names = {entry.path for entry in report.replaced}
    assert {"features", "features.conv0", "features.denseblock1", "features.transition1"} < names
    assert {entry.path for entry in report.left} == set() if "MONAI" in name else {"features.norm5"}
    revert(converted)
    assert classes_of(converted) == classes_of(original)
    assert_close(step(converted, images, seed=3), step(original, images, seed=3), 0)


@pytest.mark.parametrize(
    ("name", "dims"),
    [*[("DenseNet121", dims) for dims in (1, 2, 3)], ("DenseNet169", 3), ("DenseNet201", 3), ("DenseNet264", 3)],
)
def test_every_densenet_of_monai(name, dims):
    with torch.device("meta"):
        model = getattr(nets, name)(spatial_dims=dims, in_channels=1, out_channels=2)
    report = convert(model)
    assert not report.left
    expected = {"features", "features.conv0", "features.norm5"}
    expected |= {f"features.denseblock{index}" for index in range(1, 5)}
    expected |= {f"features.transition{index}" for index in range(1, 4)}
    assert {entry.path for entry in report.replaced} == expected


@pytest.mark.parametrize(("dims", "size"), [(1, 1024), (3, 32)])
def test_saves_a_tenth_of_the_memory(native_backend, dims, size):
    model = nets.DenseNet201(spatial_dims=dims, in_channels=1, out_channels=2)
    images = make_images(2, 1, *[size] * dims, dtype=torch.float32)
    before = saved_bytes(model, images)
    convert(model)
    assert saved_bytes(model, images) * 10 < before


# Blocks of unknown classes


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        (ResidualBlock, "not that of a dense block"),
        (LateBlock, "not that of a dense block"),
        (EvaluationBlock, "not that of a dense block"),
        (FailingBlock, "raises TypeError: .*mask"),
        (TupleBlock, "not that of a dense block"),
    ],
)
def test_what_only_looks_like_a_dense_block_is_left(block, reason):
    model = HandwrittenDenseNet(block=block)
    classes, state = classes_of(model), torch.random.get_rng_state()
    report = convert(model)
    assert classes_of(model) == classes
    assert torch.equal(torch.random.get_rng_state(), state)
    assert re.search(reason, report.left[0].note), report
    assert not report.replaced


def of_two_dimensions(block):
    block.denselayer2 = type(block.denselayer2)(2, 10, 4, 3, 0.0)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda block: setattr(block, "forward", block.forward), "its forward is set on the instance"),
        (lambda block: setattr(block.denselayer2, "drop_rate", "0.1"), "denselayer2 has a str as its drop_rate"),
        (of_two_dimensions, "denselayer2 has 2 spatial dimensions, the layers before it 3"),
    ],
)
def test_why_a_handwritten_block_is_left(change, reason):
    model = HandwrittenDenseNet()
    change(model.features.denseblock1)
    assert reason in [entry.note for entry in convert(model).left]


def test_the_trial_leaves_the_model_alone():
    original, converted, _ = make_models("handwritten 3D dropout")
    convert(converted)
    assert_close(dict(converted.state_dict()), dict(original.state_dict()), 0)
    assert [module.training for module in converted.modules()] == [module.training for module in original.modules()]


def test_no_trial_on_the_meta_device():
    with torch.device("meta"):
        model = HandwrittenDenseNet()
    assert "meta device" in convert(model).left[0].note


def test_a_handwritten_one_is_copied_and_pickled():
    original, converted, images = make_models("handwritten 3D")
    convert(converted)
    for duplicate in (copy.deepcopy(converted), pickle.loads(pickle.dumps(converted))):
        assert_close(step(duplicate, images), step(copy.deepcopy(original), images))


def test_a_hook_inside_a_handwritten_block():
    original, converted, images = make_models("handwritten 3D")
    convert(converted)
    seen = []
    converted.features.denseblock1.denselayer2.register_forward_hook(lambda *_: seen.append(1))
    with pytest.warns(UserWarning, match="layer by layer.*denselayer2"):
        assert_close(step(converted, images), step(original, images))
    assert seen == [1]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda layer: setattr(layer, "share", 0.5), "not that of a dense block of its parts"),
        (lambda layer: setattr(layer, "adapter", torch.nn.Tanh()), "not that of a dense block of its parts"),
        (lambda layer: layer.adapter.register_forward_hook(lambda *_: None), "denselayer2 has a hook"),
    ],
)
def test_a_handwritten_layer_that_is_changed_after_the_conversion(change, reason):
    """What its class was believed for holds no more."""
    original = HandwrittenDenseNet(block=AdaptableBlock).double()
    randomise(original)
    converted, images = copy.deepcopy(original), make_images(3, 3, *SIZES[3])
    assert "denseblock1" in str(convert(converted))
    assert_close(step(converted, images), step(original, images))
    for model in (original, converted):
        change(model.features.denseblock1.denselayer2)
    with pytest.warns(UserWarning, match=f"layer by layer.*{reason}"):
        assert_close(step(converted, images), step(original, images))


# MONAI's weights in a network of this package


@pytest.mark.parametrize("dims", [1, 3])
@pytest.mark.parametrize("in_channels", [3, 1, 4])
def test_weights_of_monai_load(backend, dims, in_channels):
    """Adapted to other input channels as timm does."""
    original, _, images = make_models(f"MONAI {dims}D", "eval")
    model = set_mode(EfficientDenseNet(**SMALL, in_channels=in_channels, spatial_dims=dims).double(), "eval")
    notes = load_weights(model, original.state_dict())
    assert len(notes) == (in_channels != 3)
    weight = original.features.conv0.weight.data
    if in_channels == 1:
        images = images[:, :1]
        original.features.conv0.weight.data = weight.sum(1, keepdim=True)
    elif in_channels == 4:
        images = torch.cat([images, images[:, :1]], 1)
        original.features.conv0.weight.data = torch.cat([weight, weight[:, :1]], 1) * 0.75
    assert_close({"": model(images)}, {"": original(images)})


def test_a_trial_is_on_the_cpu_whatever_the_default_device():
    expected, model = str(convert(HandwrittenDenseNet())), HandwrittenDenseNet()
    try:
        torch.set_default_device("meta")
        assert str(convert(model)) == expected
    finally:
        torch.set_default_device(None)
