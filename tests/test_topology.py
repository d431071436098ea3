"""The topology: the paper's networks by parameters, depths and shapes; torchvision's names and weights."""

import copy
import functools
import json
import pickle

import pytest
import torch
import torchvision

import densenet_efficient
from densenet_efficient import (
    DenseBlock,
    EfficientDenseNet,
    EfficientDenseNet121,
    EfficientDenseNet161,
    EfficientDenseNet169,
    EfficientDenseNet201,
    EfficientDenseNet264,
)
from densenet_efficient.models import cifar_densenet, create_model, model_names, rename_old_keys
from densenet_efficient.reference import NaiveDenseNet

PRESETS = {
    "densenet121": EfficientDenseNet121,
    "densenet161": EfficientDenseNet161,
    "densenet169": EfficientDenseNet169,
    "densenet201": EfficientDenseNet201,
    "densenet264": EfficientDenseNet264,
}
TORCHVISION = ["densenet121", "densenet161", "densenet169", "densenet201"]
SMALL = {"growth_rate": 4, "block_config": (2, 3), "num_init_features": 8, "num_classes": 5}


pytestmark = pytest.mark.usefixtures("one_thread")


def on_meta(constructor, *arguments, **options):
    with torch.device("meta"):
        return constructor(*arguments, **options)


@functools.cache
def preset(name):
    return on_meta(create_model, name)


def shapes(state_dict):
    return {name: tensor.shape for name, tensor in state_dict.items()}


# The paper's tables 1 and 2, the ImageNet counts for 1000 classes.
@pytest.mark.parametrize(
    ("name", "depth", "millions"),
    [
        ("densenet121", 121, 8.0),
        ("densenet169", 169, 14.1),
        ("densenet201", 201, 20.0),
        ("densenet161", 161, 28.7),
        ("densenet264", 265, 33.3),  # one more than its name, as its docstring says
        ("densenet-40-12", 40, 1.0),
        ("densenet-100-12", 100, 7.0),
        ("densenet-100-24", 100, 27.2),
        ("densenet-b-100-12", 100, None),  # not in the paper, which gives B and C to no network alone
        ("densenet-c-100-12", 100, None),
        ("densenet-bc-100-12", 100, 0.8),
        ("densenet-bc-250-24", 250, 15.3),
        ("densenet-bc-190-40", 190, 25.6),
    ],
)
def test_depths_and_parameter_counts_of_the_paper(name, depth, millions):
    model = preset(name)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert model.depth == depth
    assert millions is None or round(parameters / 1e6, 1) == millions


def test_264_says_that_it_counts_265():
    assert "265" in EfficientDenseNet264.__doc__


@pytest.mark.parametrize("name", model_names())
def test_every_preset_has_the_naive_models_parameters_and_buffers(name):
    model = preset(name)
    naive = on_meta(NaiveDenseNet, **model.config)
    assert shapes(model.state_dict()) == shapes(naive.state_dict())
    assert [name for name, _ in model.named_modules()] == [name for name, _ in naive.named_modules()]


@pytest.mark.parametrize("name", PRESETS)
def test_ready_classes_are_the_named_models(name):
    assert type(preset(name)) is PRESETS[name]
    assert issubclass(PRESETS[name], EfficientDenseNet)
    assert PRESETS[name].__name__ in densenet_efficient.__all__


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision_state_dicts_load_in_both_directions(name):
    theirs = getattr(torchvision.models, name)()
    ours = create_model(name)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict(), strict=True)
    expected = copy.deepcopy(theirs.state_dict())
    for tensor in theirs.state_dict().values():
        tensor.fill_(-1)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert all(torch.equal(tensor, expected[key]) for key, tensor in theirs.state_dict().items())


def test_the_same_seed_gives_torchvisions_weights():
    torch.manual_seed(0)
    theirs = torchvision.models.densenet121().state_dict()
    torch.manual_seed(0)
    ours = EfficientDenseNet121().state_dict()
    assert all(torch.equal(ours[key], tensor) for key, tensor in theirs.items())


@pytest.mark.parametrize("prefix", ["", "module."])
def test_keys_of_old_checkpoints_load(prefix):
    """torchvision's published files say `norm.1`, and files of DataParallel say `module.`."""
    model = EfficientDenseNet(**SMALL)
    old = {prefix + key: torch.full_like(tensor, 3) for key, tensor in model.state_dict().items()}
    for kind in ("norm", "conv"):
        for index in ("1", "2"):
            old = {key.replace(f".{kind}{index}.", f".{kind}.{index}."): tensor for key, tensor in old.items()}
    assert f"{prefix}features.denseblock1.denselayer1.norm.1.weight" in old
    model.load_state_dict(old, strict=True)
    assert all((tensor == 3).all() for tensor in model.state_dict().values())


def test_keys_of_other_modules_keep_their_names():
    state = {"net.module.features.norm5.bias": 1, "module.features.norm5.bias": 2}
    rename_old_keys(state, "net.")
    assert state == {"net.features.norm5.bias": 1, "module.features.norm5.bias": 2}


def test_a_submodule_of_a_subclass_may_be_named_as_a_prefix():
    class Ensemble(EfficientDenseNet):
        def __init__(self):
            super().__init__(**SMALL)
            self.model = torch.nn.Linear(3, 4)

    model, other = Ensemble(), Ensemble()
    model.load_state_dict(other.state_dict(), strict=True)
    assert torch.equal(model.model.weight, other.model.weight)


def test_two_keys_of_one_weight_are_refused():
    model = EfficientDenseNet(**SMALL)
    state = model.state_dict()
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"module\.classifier\.weight"'):
        model.load_state_dict(state | {"module.classifier.weight": torch.zeros_like(state["classifier.weight"])})


def test_another_architecture_is_refused():
    with pytest.raises(RuntimeError, match="Missing key"):
        EfficientDenseNet(**SMALL).load_state_dict(EfficientDenseNet(**SMALL, bottleneck=False).state_dict())


def output_shapes(model, images):
    """The output shape of every module by name, and of the whole under the empty name."""
    found = {}
    for name, module in model.named_modules():
        module.register_forward_hook(lambda _, inputs, output, name=name: found.update({name: tuple(output.shape)}))
    model(images)
    return found


# A hook makes a block run through its modules and say so; on the meta device that allocates nothing.
@pytest.mark.filterwarnings("ignore:a dense block runs layer by layer")
def test_densenet121_layer_by_layer():
    """Table 1 of the paper, and in each block its growth: layer l reads C0 + (l - 1) * k channels."""
    model = on_meta(EfficientDenseNet121)
    found = output_shapes(model, torch.empty(2, 3, 224, 224, device="meta"))
    assert found["features.conv0"] == (2, 64, 112, 112)
    channels, size = 64, 56
    assert found["features.pool0"] == (2, channels, size, size)
    for block, num_layers in enumerate((6, 12, 24, 16), start=1):
        for index in range(num_layers):
            layer = f"features.denseblock{block}.denselayer{index + 1}"
            assert found[f"{layer}.norm1"] == (2, channels + 32 * index, size, size)
            assert found[f"{layer}.conv1"] == found[f"{layer}.norm2"] == (2, 128, size, size)
            assert found[f"{layer}.conv2"] == found[layer] == (2, 32, size, size)
        channels += 32 * num_layers
        assert found[f"features.denseblock{block}"] == (2, channels, size, size)
        if block < 4:
            assert found[f"features.transition{block}.conv"] == (2, channels // 2, size, size)
            channels, size = channels // 2, size // 2
            assert found[f"features.transition{block}"] == (2, channels, size, size)
    assert found["features.norm5"] == found["features"] == (2, 1024, 7, 7)
    assert found[""] == (2, 1000)


@pytest.mark.filterwarnings("ignore:a dense block runs layer by layer")
def test_small_inputs_keep_their_size():
    """The CIFAR networks pool in their transitions alone: 32, 16, 8."""
    model = on_meta(create_model, "densenet-bc-100-12")
    found = output_shapes(model, torch.empty(2, 3, 32, 32, device="meta"))
    assert found["features.conv0"] == (2, 24, 32, 32)
    assert found["features.denseblock1"] == (2, 216, 32, 32)
    assert found["features.denseblock2"] == (2, 300, 16, 16)
    assert found["features.denseblock3"] == (2, 342, 8, 8)
    assert found[""] == (2, 10)


def test_in_channels():
    assert EfficientDenseNet(**SMALL, in_channels=1).features.conv0.weight.shape == (8, 1, 7, 7)
    assert create_model("densenet-40-12", in_channels=1).features.conv0.weight.shape == (16, 1, 3, 3)


@pytest.mark.parametrize(("compression", "channels"), [(0.5, 12), (1.0, 24), (0.3, 7)])
def test_compression_rounds_down(compression, channels):
    model = on_meta(EfficientDenseNet, 8, (2, 2), 8, compression=compression)
    assert model.features.transition1.conv.weight.shape == (channels, 24, 1, 1)
    assert model.classifier.in_features == channels + 16


@pytest.mark.parametrize(
    ("bottleneck", "compression", "num_init_features"),
    [(False, 1.0, 16), (True, 1.0, 16), (False, 0.5, 16), (True, 0.5, 24)],
)
def test_cifar_variants(bottleneck, compression, num_init_features):
    model = on_meta(cifar_densenet, 40, 12, bottleneck, compression)
    assert model.depth == 40
    assert model.features.conv0.weight.shape == (num_init_features, 3, 3, 3)
    assert len(model.features.denseblock1) == (6 if bottleneck else 12)
    assert hasattr(model.features.denseblock1.denselayer1, "conv2") == bottleneck
    transition = model.features.transition1.conv
    assert transition.out_channels == int(transition.in_channels * compression)
    assert model.classifier.out_features == 10
    assert on_meta(cifar_densenet, 40, 12, bottleneck, compression, num_classes=100).classifier.out_features == 100


@pytest.mark.parametrize(("depth", "bottleneck"), [(41, False), (43, True), (4, False), (0, True)])
def test_depths_that_no_cifar_network_has(depth, bottleneck):
    with pytest.raises(ValueError, match=rf"depth.*{depth}"):
        cifar_densenet(depth, 12, bottleneck)


@pytest.mark.parametrize(
    ("options", "level"),
    [
        ({}, "bottleneck"),
        ({"memory_efficient": True}, "bottleneck"),
        ({"memory_efficient": False}, "none"),
        ({"memory_efficient": False, "checkpointing": "bottleneck"}, "bottleneck"),
        ({"checkpointing": "none"}, "none"),
    ],
)
def test_checkpointing_level(options, level):
    model = on_meta(EfficientDenseNet, **SMALL, **options)
    assert model.checkpointing == model.config["checkpointing"] == level
    for other in ("none", "bottleneck"):
        model.checkpointing = other
        assert model.checkpointing == model.config["checkpointing"] == other
    with pytest.raises(ValueError, match=r"checkpointing.*everything"):
        model.checkpointing = "everything"
    assert model.checkpointing == "bottleneck"


@pytest.mark.parametrize("level", ["everything", "", None, ["none"]], ids=str)
def test_a_block_refuses_an_unknown_level(level):
    block = DenseBlock(2, 6, growth_rate=4, checkpointing="none")
    with pytest.raises(ValueError, match="checkpointing must be one of none, bottleneck, got"):
        block.checkpointing = level
    assert block.checkpointing == "none"
    block.checkpointing = "bottleneck"
    copied = pickle.loads(pickle.dumps(copy.deepcopy(block)))
    assert copied.checkpointing == block.checkpointing == "bottleneck"


def test_a_level_leaves_what_a_user_put_in_a_blocks_place_alone():
    model = EfficientDenseNet(4, (2, 2), 6, checkpointing="bottleneck")
    model.features.denseblock1 = torch.nn.Identity()
    model.checkpointing = "none"
    assert not hasattr(model.features.denseblock1, "checkpointing")
    assert model.features.denseblock2.checkpointing == "none"


def test_config_rebuilds_the_network():
    model = on_meta(EfficientDenseNet121, num_classes=7, in_channels=1, drop_rate=0.2, checkpointing="none")
    rebuilt = on_meta(EfficientDenseNet, **json.loads(json.dumps(model.config)))
    assert rebuilt.config == model.config
    assert shapes(rebuilt.state_dict()) == shapes(model.state_dict())


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_whole(duplicate):
    model = EfficientDenseNet(**SMALL, checkpointing="none").eval()
    other = duplicate(model)
    assert other.config == model.config
    assert other.checkpointing == "none"
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(other(images), model(images))
    other.checkpointing = "bottleneck"
    assert model.checkpointing == "none"


@pytest.mark.parametrize(
    ("options", "error"),
    [
        *(({name: 0}, ValueError) for name in ("growth_rate", "num_init_features", "bn_size")),
        *(({name: -1}, ValueError) for name in ("num_classes", "in_channels")),
        ({"growth_rate": 12.0}, TypeError),
        *(({name: True}, TypeError) for name in ("growth_rate", "drop_rate")),
        ({"spatial_dims": True}, ValueError),
        ({"num_classes": "10"}, TypeError),
        ({"block_config": ()}, ValueError),
        ({"block_config": (2, 0)}, ValueError),
        ({"block_config": (2, 1.5)}, TypeError),
        ({"drop_rate": 1.0}, ValueError),
        ({"drop_rate": -0.1}, ValueError),
        ({"drop_rate": float("nan")}, ValueError),
        ({"compression": 0.0}, ValueError),
        ({"compression": 1.1}, ValueError),
        ({"compression": 0.01}, ValueError),  # leaves a transition of this network no channel
        ({"norm_eps": "small"}, TypeError),
        ({"norm_eps": 0.0}, ValueError),
        ({"norm_eps": float("nan")}, ValueError),
        ({"bottleneck": "no"}, TypeError),
        ({"small_inputs": 1}, TypeError),
        ({"checkpointing": "everything"}, ValueError),
        ({"checkpointing": ""}, ValueError),
    ],
)
def test_impossible_arguments(options, error):
    (name,) = options
    with pytest.raises(error, match=name):
        EfficientDenseNet(**SMALL | options)


def test_a_list_that_was_given_is_the_caller_s():
    layers, levels = [2, 1], ["none", "bottleneck"]
    model = EfficientDenseNet(**SMALL | {"block_config": layers, "checkpointing": levels})
    layers.append(7)
    levels[0] = "bottleneck"
    assert model.config["block_config"] == [2, 1]
    assert model.checkpointing == ["none", "bottleneck"]
    model.checkpointing[0] = "bottleneck"
    assert model.checkpointing == ["none", "bottleneck"]


def test_a_plain_network_has_no_weights_of_torchvision():
    with pytest.raises(ValueError, match="torchvision has no weights of a plain EfficientDenseNet"):
        EfficientDenseNet(**SMALL).load_torchvision("DEFAULT")


def test_unknown_names_list_the_known_ones():
    with pytest.raises(ValueError, match=r"densenet122.*densenet121.*densenet-bc-190-40"):
        create_model("densenet122")


def test_the_three_lines_of_the_readme():
    """torchvision's model replaced: its weights, one training step, then inference."""
    theirs = torchvision.models.densenet201(num_classes=10)
    model = EfficientDenseNet201(num_classes=10)
    model.load_state_dict(theirs.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    images = torch.randn(2, 3, 64, 64)
    loss = torch.nn.functional.cross_entropy(model(images), torch.tensor([1, 2]))
    loss.backward()
    optimizer.step()
    assert torch.isfinite(loss)
    changed = [not torch.equal(parameter, theirs.get_parameter(name)) for name, parameter in model.named_parameters()]
    assert all(changed)
    with torch.no_grad():
        assert model.eval()(images).shape == (2, 10)
