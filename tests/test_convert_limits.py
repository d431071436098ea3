"""What `convert` leaves and why, its report, and what it refuses: the model is as it was."""

import copy
import importlib
import re

import pytest
import timm
import torch
import torchvision
from cases import assert_close, make_images, saved_bytes, step
from conversion_cases import (
    MODELS,
    OwnForward,
    UNet,
    make_model,
    make_models,
    monai_densenet2d,
    timm_densenet,
    torchvision_densenet,
    xray,
)
from test_convert import IMAGES, blocks_of, classes_of
from timm.layers import BlurPool2d
from torch import nn
from torchvision.models._utils import IntermediateLayerGetter

from densenet_efficient import EfficientDenseNet, convert, revert
from densenet_efficient.conversion.modules import Converted

pytestmark = pytest.mark.usefixtures("one_thread", "nan_memory")


@pytest.mark.parametrize("name", timm.list_models("densenet*"))
def test_every_densenet_of_timm(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    report = convert(model)
    stem = {"features.conv0"} if name in ("densenetblur121d", "densenet264d") else set()
    assert {entry.path for entry in report.left} == stem
    expected = {"features", "features.norm5", *(f"features.denseblock{index}" for index in range(1, 5))}
    expected |= {f"features.transition{index}" for index in range(1, 4)} | ({"features.conv0"} - stem)
    assert {entry.path for entry in report.replaced} == expected


class OwnBlock(type(torchvision_densenet().features.denseblock1)):
    def forward(self, x):
        return super().forward(x) * 2


class OwnDenseNet(torchvision.models.DenseNet):
    def forward(self, x):
        return super().forward(x) + self.features(x).mean()


def with_own_block():
    model = torchvision_densenet()
    model.features.denseblock1.__class__ = OwnBlock
    return model


def with_hook():
    model = torchvision_densenet()
    model.features.denseblock1.denselayer1.register_forward_hook(lambda *_: None)
    return model


def with_own_call():
    model = torchvision_densenet()
    forward = model.features.denseblock1.forward
    model.features.denseblock1.forward = lambda x: forward(x)
    return model


BLOCK1, TRANSITION1 = "features.denseblock1", "features.transition1"
LEFT = {
    "own block": (with_own_block, BLOCK1, "not that of torchvision's _DenseBlock"),
    "own forward of an instance": (with_own_call, BLOCK1, "not that of torchvision's _DenseBlock"),
    "hook": (with_hook, BLOCK1, "denselayer1 has a hook"),
    "own network": (lambda: OwnDenseNet(4, (3, 2), 6, 3, num_classes=5), "features.norm5", "OwnDenseNet's own forward"),
    "GroupNorm": (lambda: timm_densenet(norm_layer="groupnorm1"), BLOCK1, "GroupNorm.*expected BatchNorm1d, 2d or 3d"),
    "SiLU": (lambda: timm_densenet(act_layer="silu"), BLOCK1, "SiLU.*expected ReLU"),
    "blur pooling": (lambda: timm_densenet(aa_layer=BlurPool2d, aa_stem_only=False), TRANSITION1, "average pooling"),
    "deep stem": (lambda: timm_densenet(stem_type="deep"), "features.conv0", "maximum pooling"),
    "instance norm": (lambda: monai_densenet2d(norm="instance"), BLOCK1, "InstanceNorm2d"),
    "leaky": (lambda: monai_densenet2d(act="leakyrelu"), BLOCK1, "relu1 is replaced"),
    "stem": (lambda: MODELS["timm features"](), "net.features_conv0", "before its pooling is returned"),
    "transition": (OwnForward, "transition1", "OwnForward's own forward"),
}


@pytest.mark.parametrize(("make", "path", "reason"), LEFT.values(), ids=LEFT)
def test_what_is_left(make, path, reason):
    torch.manual_seed(0)
    model = make().double()
    torch.manual_seed(0)
    original = make().double()
    report = convert(model)
    entry = next(entry for entry in report.left if entry.path == path)
    assert re.search(reason, entry.note), entry.note
    assert type(model.get_submodule(path)) is type(original.get_submodule(path))
    assert re.search(rf"^left +{path} +{entry.kind} +{re.escape(entry.note)}$", str(report), re.MULTILINE)
    images = make_images(*IMAGES)
    assert_close(step(model, images), step(original, images))


def layer2_of(make, change):
    def changed():
        model = make()
        change(model.features.denseblock1.denselayer2)
        return model

    return changed


def hook(module):
    module.register_forward_hook(lambda *_: None)


def with_other_bottleneck():
    model = torchvision_densenet()
    block = model.features.denseblock1
    block.denselayer2 = type(block.denselayer2)(10, 4, 2, 0.0)
    return model


REASONS = {
    "own layer": (
        layer2_of(torchvision_densenet, lambda layer: setattr(layer, "__class__", type("Mine", (type(layer),), {}))),
        "denselayer2 is a Mine, not torchvision's _DenseLayer",
    ),
    "other widths": (
        with_other_bottleneck,
        "denselayer2 has other channel counts than its place in the block asks for",
    ),
    "own dropout": (
        layer2_of(torchvision_densenet, lambda layer: setattr(layer, "drop_rate", 0.5)),
        "denselayer2 has a dropout of its own",
    ),
    "widths of a layer": (
        layer2_of(torchvision_densenet, lambda layer: setattr(layer, "conv1", nn.Conv2d(9, 12, 1, bias=False))),
        "denselayer2 has other channel counts than its norms",
    ),
    "stride": (
        layer2_of(torchvision_densenet, lambda layer: setattr(layer.conv2, "stride", (2, 2))),
        "denselayer2.conv2 is replaced, observed or of another geometry",
    ),
    "another module of torchxrayvision": (
        layer2_of(xray, lambda layer: layer.add_module("extra", nn.Identity())),
        "denselayer2 has other submodules than its norms, ReLUs and convolutions, or in another order",
    ),
    "MONAI's layers": (
        layer2_of(monai_densenet2d, lambda layer: hook(layer.layers)),
        "denselayer2.layers is replaced or observed",
    ),
    "another module of MONAI": (
        layer2_of(monai_densenet2d, lambda layer: layer.layers.add_module("extra", nn.Identity())),
        "denselayer2.layers has other modules than norms, ReLUs, convolutions and dropout, or in another order",
    ),
    "MONAI's dropout": (
        layer2_of(lambda: monai_densenet2d(dropout_prob=0.3), lambda layer: hook(layer.layers.dropout)),
        "denselayer2.layers.dropout is replaced or observed",
    ),
}


@pytest.mark.parametrize(("make", "reason"), REASONS.values(), ids=REASONS)
def test_why_a_block_is_left(make, reason):
    notes = {entry.path: entry.note for entry in convert(make()).left}
    assert notes[BLOCK1] == reason


@pytest.mark.parametrize("path", ["class_layers", "class_layers.pool", "features.denseblock2.denselayer1"])
@pytest.mark.filterwarnings("ignore:a dense block runs layer by layer")
def test_what_is_observed_after_the_conversion_runs_by_its_modules(path):
    original, converted = make_models("MONAI")
    convert(converted)
    hook(converted.get_submodule(path))
    images = make_images(*IMAGES)
    assert_close(step(converted, images), step(original, images))


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("features.denseblock1", ["features.denseblock1", "features.transition1"]),
        ("features.denseblock2", ["features.denseblock2", "features.norm5"]),
        ("", [f"features.{name}" for name in ("denseblock1", "transition1", "denseblock2", "norm5")]),
    ],
)
@pytest.mark.parametrize("make", [torchvision_densenet, timm_densenet, monai_densenet2d])
def test_nothing_of_a_densenet_is_missing_in_the_report(make, path, expected):
    """Of a block that is left, what would be one operator with it is left too, and named."""
    model = make()
    for name, block in model.features.named_children():
        if path in ("", f"features.{name}") and name.startswith("denseblock"):
            block.denselayer1.register_forward_hook(lambda *_: None)
    report = convert(model)
    assert [entry.path for entry in report.left] == expected
    parts = {f"features.{name}" for name in ("denseblock1", "transition1", "denseblock2", "norm5")}
    assert parts <= {entry.path for entry in (*report.left, *report.replaced)}


def test_the_report_is_a_table():
    lines = str(convert(UNet())).splitlines()
    assert lines[0].split() == ["module", "class"]
    assert "replaced  encoder.denseblock1  _DenseBlock  3 layers over one storage" in lines


@pytest.mark.parametrize(
    ("name", "path", "condition"),
    [
        ("torchvision", "features", ""),
        ("sequence", "1.features", ""),
        ("pyramid", "backbone.body", ""),
        ("segmentation encoder", "encoder.features", ", where DenseNetEncoder's own forward calls it as a whole"),
        ("U-Net", "encoder", ", where UNet's own forward calls it as a whole"),
    ],
)
def test_the_report_says_where_a_sequence_may_not_be_called(name, path, condition):
    notes = {entry.path: entry.note for entry in convert(make_model(name)).replaced}
    assert notes[path].endswith(f"as one operator each{condition}")


def test_a_sequence_of_sequences_calls_each_as_a_whole():
    model = nn.Sequential(make_model("torchvision").features, nn.ReLU())
    notes = {entry.path: entry.note for entry in convert(model).replaced}
    assert notes["0"].endswith("as one operator each")


# Bad input


@pytest.mark.parametrize("model", [torchvision.models.resnet18(), nn.Linear(2, 2)])
def test_nothing_is_a_densenet(model):
    classes = classes_of(model)
    with pytest.raises(ValueError, match=r"no DenseNet in a \w+: looked for torchvision's _DenseBlock .*, timm's"):
        convert(model)
    assert classes_of(model) == classes


@pytest.mark.filterwarnings("ignore:`torch.jit", "ignore::DeprecationWarning")
@pytest.mark.parametrize("compiled", [torch.jit.script, lambda model: torch.jit.trace(model, make_images(*IMAGES))])
def test_torchscript_is_left_as_it_is(compiled):
    script = compiled(make_model("torchvision", "eval"))
    for model in (script, nn.Sequential(script, nn.Linear(5, 2))):
        with pytest.raises(ValueError, match=r"TorchScript has compiled or traced.*convert the model before"):
            convert(model)
    beside = nn.ModuleList([script, make_model("torchvision")])
    assert {entry.path[:2] for entry in convert(beside).replaced} == {"1."}


def test_an_efficient_densenet_needs_no_conversion():
    with pytest.raises(ValueError, match=r"features.denseblock1 is a block of this package"):
        convert(EfficientDenseNet(4, (2, 2), 6))


@pytest.mark.parametrize("function", [convert, revert])
def test_not_a_module(function):
    with pytest.raises(TypeError, match=r"expected a torch.nn.Module .* got a OrderedDict"):
        function(torchvision_densenet().state_dict())


def test_an_unknown_level():
    model = torchvision_densenet()
    with pytest.raises(ValueError, match="checkpointing must be one of none, bottleneck, got 'all'"):
        convert(model, checkpointing="all")
    assert not blocks_of(model)
    convert(model)
    with pytest.raises(ValueError, match="checkpointing must be one of none, bottleneck, got 'all'"):
        blocks_of(model)[0].checkpointing = "all"
    revert(model)
    assert not any("checkpointing" in name for module in model.modules() for name in vars(module))


def test_converting_twice_sets_the_level():
    model = torchvision_densenet()
    convert(model)
    classes = classes_of(model)
    report = convert(model, checkpointing="none")
    assert classes_of(model) == classes
    assert [(entry.path, entry.note) for entry in report.replaced] == [
        (f"features.denseblock{index}", "converted already") for index in (1, 2)
    ]
    assert {block.checkpointing for block in blocks_of(model)} == {"none"}


def test_a_layer_that_knows_its_block():
    """A cycle of modules, which torch does not mind."""
    models = [torchvision_densenet().double() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    for model in models:
        model.features.denseblock1.denselayer2.parent = model.features.denseblock1
    convert(models[1])
    images = make_images(*IMAGES)
    assert_close(step(models[1], images), step(models[0], images))


class Only(nn.Module):
    """The one value of a dictionary."""

    def forward(self, outputs):
        (output,) = outputs.values()
        return output


def converted_densenet():
    model = torchvision_densenet()
    convert(model)
    return model


@pytest.mark.parametrize("make", [lambda: EfficientDenseNet(4, (3, 2), 6, 3), converted_densenet])
@pytest.mark.parametrize(
    "gather",
    [
        lambda features: nn.Sequential(*list(features.children())[:-1]),
        lambda features: nn.Sequential(IntermediateLayerGetter(features, {"denseblock2": "out"}), Only()),
    ],
    ids=["sequence", "layer getter"],
)
def test_blocks_that_moved_take_their_transitions_along(native_backend, make, gather):
    moved = gather(make().double().features)
    apart, images = copy.deepcopy(moved), make_images(*IMAGES)
    notes = {entry.note for entry in convert(moved).replaced}
    assert {"the stem: one operator with its norm, ReLU and pooling", "one operator with its block"} <= notes
    assert_close(step(moved, images), step(apart, images))
    assert saved_bytes(moved, images) < saved_bytes(apart, images)


@pytest.mark.parametrize("compiled", [False, True])
def test_the_norm_behind_the_last_block_may_be_taken_away(compiled):
    models = [torchvision_densenet().double() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    convert(models[1])
    for model in models:
        model.features.norm5 = nn.Identity()
    if compiled:
        models[1].compile(fullgraph=True, backend="aot_eager")
    images = make_images(*IMAGES)
    assert_close(step(models[1], images), step(models[0], images))


def test_a_hooked_head_compiles_to_a_full_graph(native_backend):
    models = [torchvision_densenet().double() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    convert(models[1])
    for model in models:
        model.features.norm5.register_forward_hook(lambda _, inputs, output: output * 2)
    models[1].compile(fullgraph=True, backend="aot_eager")
    images = make_images(*IMAGES)
    assert_close(step(models[1], images), step(models[0], images))


def test_half_a_conversion():
    model = torchvision_densenet()
    convert(model.features.denseblock2)
    classes = classes_of(model)
    with pytest.raises(ValueError, match=r"features.denseblock2 is, features.denseblock1 is not; revert"):
        convert(model)
    assert classes_of(model) == classes
    revert(model)
    convert(model)


def test_nothing_to_revert():
    with pytest.raises(ValueError, match="nothing in this DenseNet was converted"):
        revert(torchvision_densenet())


def test_an_exception_in_the_middle_leaves_the_model_as_it_was(monkeypatch):
    model = torchvision_densenet()
    classes = classes_of(model)
    module = importlib.import_module("densenet_efficient.conversion")
    replace_class, calls = module.replace_class, []

    def fail_at_the_third(*args):
        calls.append(args)
        if len(calls) == 3:
            raise RuntimeError("no more")
        replace_class(*args)

    monkeypatch.setattr(module, "replace_class", fail_at_the_third)
    with pytest.raises(RuntimeError, match="no more"):
        convert(model)
    assert len(calls) == 3
    assert classes_of(model) == classes
    assert not any(isinstance(module, Converted) for module in model.modules())
