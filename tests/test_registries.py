"""timm's and torchvision's registries: the models of create_model and get_model, with all that theirs offer."""

import copy
import pickle

import pytest
import timm
import torch
import torchvision
from cases import LEVELS, assert_close, make_images, randomise, step
from timm.models import FeatureGraphNet, get_pretrained_cfg
from torchvision.models.feature_extraction import create_feature_extractor

import densenet_efficient
import densenet_efficient.timm
import densenet_efficient.torchvision
from densenet_efficient import EfficientDenseNet, EfficientDenseNet201, modules, operator_calls
from densenet_efficient.conversion.modules import ConvertedBlock, ConvertedTimm

pytestmark = pytest.mark.usefixtures("one_thread")
NETWORKS = ["121", "161", "169", "201", "264", "264d", "blur121d"]
NAMES = [f"efficient_densenet{network}" for network in NETWORKS]
TINY = {"growth_rate": 4, "block_config": (3, 2), "bn_size": 3, "num_classes": 5}


def make_pair(mode="train", network="densenet121", **arguments):
    """(timm's, ours) with equal weights, small and in float64."""
    torch.manual_seed(0)
    theirs = timm.create_model(network, **TINY | arguments)
    randomise(theirs)
    ours = timm.create_model(f"efficient_{network}", **TINY | arguments)
    ours.load_state_dict(theirs.state_dict())
    return theirs.double().train(mode == "train"), ours.double().train(mode == "train")


def blocks_of(model):
    return [module for module in model.modules() if isinstance(module, ConvertedBlock)]


def test_names():
    assert timm.list_models("efficient_densenet*") == NAMES
    assert all(hasattr(densenet_efficient.timm, name) for name in NAMES)
    assert timm.list_pretrained("efficient_densenet121") == [
        "efficient_densenet121.ra_in1k",
        "efficient_densenet121.tv_in1k",
    ]


@pytest.mark.parametrize("network", NETWORKS)
def test_every_network(network):
    with torch.device("meta"):
        ours = timm.create_model(f"efficient_densenet{network}")
        if network == "264":
            expected = densenet_efficient.EfficientDenseNet264()
        else:
            expected = timm.create_model(f"densenet{network}")
    assert isinstance(ours, ConvertedTimm)
    assert len(blocks_of(ours)) == 4
    shapes = [{key: value.shape for key, value in model.state_dict().items()} for model in (ours, expected)]
    assert shapes[0] == shapes[1]
    assert ours.pretrained_cfg["architecture"] == f"efficient_densenet{network}"


ARGUMENTS = {
    "default": {},
    "channels": {"in_chans": 2},
    "maximum": {"global_pool": "max"},
    "average and maximum": {"global_pool": "catavgmax"},
    "no classifier": {"num_classes": 0},
    "no pooling": {"global_pool": "", "num_classes": 0},
    "dropout": {"drop_rate": 0.3, "proj_drop_rate": 0.2},
    "deep stem": {"stem_type": "deep"},
}


@pytest.mark.parametrize("arguments", ARGUMENTS.values(), ids=ARGUMENTS)
def test_arguments(arguments):
    theirs, ours = make_pair(**arguments)
    images = make_images(2, arguments.get("in_chans", 3), 33, 47)
    assert_close(step(ours, images, seed=5), step(theirs, images, seed=5))


def test_methods():
    theirs, ours = make_pair("eval")
    images = make_images(2, 3, 33, 47)
    assert ours.feature_info == theirs.feature_info
    assert ours.pretrained_cfg["classifier"] == "classifier"
    assert ours.get_classifier() is ours.classifier
    assert ours.group_matcher() == theirs.group_matcher()
    features = [model.forward_features(images) for model in (ours, theirs)]
    heads = [model.forward_head(features[1], pre_logits=True) for model in (ours, theirs)]
    assert_close({"": features[0]}, {"": features[1]})
    assert_close({"": heads[0]}, {"": heads[1]})
    for model in (ours, theirs):
        torch.manual_seed(3)
        model.reset_classifier(4, "max")
    assert ours.num_classes == ours.get_classifier().out_features == 4
    assert_close({"": ours(images)}, {"": theirs(images)})


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    "arguments",
    [{}, {"indices": [0, 2]}, {"indices": 1}, {"indices": [1], "stop_early": True, "intermediates_only": True}],
    ids=str,
)
def test_forward_intermediates(level, arguments):
    results = []
    for model in make_pair():
        if isinstance(model, ConvertedTimm):
            model.set_grad_checkpointing(level == "bottleneck")
        images = make_images(2, 3, 33, 47).requires_grad_()
        outputs = model.forward_intermediates(images, **arguments)
        tensors = outputs if arguments.get("intermediates_only") else [outputs[0], *outputs[1]]
        sum((tensor**2).sum() for tensor in tensors).backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        named = {str(index): tensor for index, tensor in enumerate(tensors)}
        results.append(named | gradients | dict(model.named_buffers()) | {"images.grad": images.grad})
    assert_close(results[1], results[0])


def test_forward_intermediates_runs_blocks_and_transitions_as_one(monkeypatch):
    _, ours = make_pair()
    runs = []
    run_stage = operator_calls.run_stage
    for module in (operator_calls, modules):
        monkeypatch.setattr(
            module, "run_stage", lambda *stage, **later: runs.append(stage) or run_stage(*stage, **later)
        )
    ours.forward_intermediates(make_images(2, 3, 33, 47), indices=[1, 2])
    assert [type(stage_exit.consumer).__name__ for _, _, stage_exit, _ in runs] == [
        "DenseTransition",
        "NoneType",
    ]  # the last block alone
    with pytest.raises(ValueError, match="output_fmt must be NCHW, got 'NLC'"):
        ours.forward_intermediates(make_images(1, 3, 33, 47), output_fmt="NLC")


def test_intermediates_of_a_pruned_model():
    theirs, ours = make_pair("eval")
    images = make_images(2, 3, 33, 47)
    for model in (theirs, ours):
        assert model.prune_intermediate_layers([0, 1]) == [0, 1]
    outputs = [model.forward_intermediates(images, intermediates_only=True) for model in (ours, theirs)]
    results = [dict(enumerate(features)) for features in outputs]
    assert_close(*results)


@pytest.mark.parametrize("feature_cls", ["list", "dict", "hook", "getter", "fx", "FX", FeatureGraphNet])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_features_only(feature_cls, checkpointing):
    theirs, ours = make_pair(features_only=True, feature_cls=feature_cls, out_indices=(1, 2))
    assert ours.feature_info.channels() == [20, 18]
    assert ours.feature_info.reduction() == theirs.feature_info.reduction()
    assert blocks_of(ours)
    if feature_cls in ("list", "dict"):  # timm's own checkpointing updates the running statistics twice
        ours.set_grad_checkpointing(checkpointing)
        assert {block.checkpointing for block in blocks_of(ours)} == {"bottleneck" if checkpointing else "none"}
    results = []
    for model in (ours, theirs):
        features = model(make_images(2, 3, 33, 47))
        tensors = list(features.values()) if isinstance(features, dict) else features
        sum((tensor**2).sum() for tensor in tensors).backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        results.append(dict(zip("12", tensors, strict=True)) | gradients | dict(model.named_buffers()))
    assert_close(*results)


def test_a_graph_keeps_the_blocks_whole():
    arguments = {"features_only": True, "out_indices": (1, 2), "checkpointing": "none"} | TINY
    graph = timm.create_model("efficient_densenet121", feature_cls="fx", **arguments)
    assert {block.checkpointing for block in blocks_of(graph)} == {"none"}
    model = timm.create_model("efficient_densenet121", **TINY)
    extractor = timm.models.create_feature_extractor(model, {"features.denseblock1": "block"})
    for traced in (graph.graph_module, extractor):
        assert isinstance(traced.get_submodule("features.denseblock1"), ConvertedBlock)
        assert not [node for node in traced.graph.nodes if "denselayer" in node.name]


@pytest.mark.parametrize(
    ("arguments", "level"),
    [({}, "bottleneck"), ({"memory_efficient": False}, "none"), ({"checkpointing": "none"}, "none")],
)
def test_levels(arguments, level):
    model = timm.create_model("efficient_densenet121", **TINY, **arguments)
    assert {block.checkpointing for block in blocks_of(model)} == {level}
    model.set_grad_checkpointing(level == "none")
    assert {block.checkpointing for block in blocks_of(model)} == {"bottleneck" if level == "none" else "none"}


@pytest.mark.parametrize("tag", ["", ".tv_in1k"])
def test_pretrained(tmp_path, tag):
    theirs = timm.create_model("densenet121")
    randomise(theirs)
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    file = {"file": str(tmp_path / "weights.pth")}
    ours = timm.create_model(f"efficient_densenet121{tag}", pretrained=True, pretrained_cfg_overlay=file)
    assert ours.pretrained_cfg["tag"] == (tag[1:] or "ra_in1k")
    assert_close(ours.state_dict(), theirs.state_dict(), 0)
    ours = timm.create_model("efficient_densenet121", True, pretrained_cfg_overlay=file, num_classes=3, in_chans=1)
    assert ours.classifier.out_features == 3
    expected = theirs.features.conv0.weight.sum(1, keepdim=True)
    torch.testing.assert_close(ours.features.conv0.weight, torch.nn.Parameter(expected))
    ours = timm.create_model("efficient_densenet121", True, pretrained_cfg_overlay=file, features_only=True)
    expected = {f"features_{key}": value for key, value in theirs.features.state_dict().items()}
    assert_close(ours.state_dict(), expected, 0)
    assert len(blocks_of(ours)) == 4


def test_configurations_are_those_of_timm():
    for name in timm.list_pretrained("efficient_densenet*"):
        ours, theirs = get_pretrained_cfg(name), get_pretrained_cfg(name.removeprefix("efficient_"))
        assert ours.hf_hub_id == theirs.hf_hub_id
        assert ours.to_dict() == theirs.to_dict() | {"architecture": name.partition(".")[0]}


def test_the_network_that_timm_has_not_is_configured_and_changed_as_the_others():
    cfg = get_pretrained_cfg("efficient_densenet264")
    assert (cfg.input_size, cfg.first_conv, cfg.classifier) == ((3, 224, 224), "features.conv0", "classifier")
    with torch.device("meta"):
        model = timm.create_model("efficient_densenet264", block_config=(2, 1))
    assert [len(block) for block in blocks_of(model)] == [2, 1]


@pytest.mark.parametrize("registry", ["timm", "torchvision"])
def test_builders_are_found_again_by_their_names(registry):
    builder = getattr(densenet_efficient, registry).efficient_densenet121
    assert pickle.loads(pickle.dumps(builder)) is builder


def test_no_pretrained_weights():
    with pytest.raises(RuntimeError, match="No pretrained weights exist for efficient_densenet264"):
        timm.create_model("efficient_densenet264", pretrained=True)


def test_offline(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(RuntimeError, match=r"weights of timm/densenet121\.ra_in1k.*pretrained_cfg_overlay=\{'file'"):
        timm.create_model("efficient_densenet121", pretrained=True, cache_dir=tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"norm_layer": "groupnorm1"}, r"features\.denseblock1: denselayer1\.norm1 is a GroupNorm"),
        ({"act_layer": "silu"}, r"features\.denseblock1: .* holds a SiLU"),
        ({"features_only": True, "feature_cls": "fx", "out_indices": (1, 2), "act_layer": "silu"}, "holds a SiLU"),
        ({"checkpointing": "everything"}, "checkpointing must be one of none, bottleneck, got 'everything'"),
    ],
)
def test_arguments_that_cannot_be(arguments, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("efficient_densenet121", **TINY, **arguments)


def test_unregistered_names():
    with pytest.raises(RuntimeError, match=r"Unknown model.*efficient_densenet99"):
        timm.create_model("efficient_densenet99")
    with pytest.raises(ValueError, match="Unknown model efficient_densenet99"):
        torchvision.models.get_model("efficient_densenet99")


def test_torchvision_names():
    names = [f"efficient_densenet{number}" for number in (121, 161, 169, 201, 264)]
    assert torchvision.models.list_models(module=densenet_efficient) == names
    with torch.device("meta"):
        models = [torchvision.models.get_model(name, num_classes=3, drop_rate=0.1) for name in names]
    assert [f"efficient_{model.architecture}" for model in models] == names
    assert all(model.config["num_classes"] == 3 for model in models)
    assert torchvision.models.get_model_builder(names[0]) is densenet_efficient.torchvision.efficient_densenet121


def test_torchvision_weights(monkeypatch):
    weights = torchvision.models.get_model_weights("efficient_densenet201")
    assert weights is torchvision.models.DenseNet201_Weights
    theirs = torchvision.models.densenet201()
    progress = []

    def state(*args, **kwargs):
        progress.append(kwargs["progress"])
        return theirs.state_dict()

    monkeypatch.setattr(weights, "get_state_dict", state)
    ours = torchvision.models.get_model("efficient_densenet201", weights="DEFAULT", progress=False)
    assert type(ours) is EfficientDenseNet201
    assert ours.weights is weights.DEFAULT
    assert progress == [False]
    assert_close(ours.state_dict(), theirs.state_dict(), 0)


@pytest.mark.parametrize("leaf", [True, False], ids=["blocks as one", "through the modules"])
def test_create_feature_extractor(leaf):
    torch.manual_seed(0)
    model = EfficientDenseNet(4, (3, 2), 6, 3, num_classes=5).double()
    randomise(model)
    expected = copy.deepcopy(model)
    nodes = {"features.denseblock1": "shallow", "features.denseblock2": "deep"}
    options = {"leaf_modules": [densenet_efficient.modules.DenseBlock]} if leaf else {}
    with torch.no_grad():
        warnings = pytest.warns(UserWarning, match="torch.fx traces") if not leaf else pytest.MonkeyPatch.context()
        with warnings:
            extractor = create_feature_extractor(model, nodes, tracer_kwargs=options)
        images = make_images(2, 3, 33, 47)
        outputs = extractor(images)
        shallow = expected.features.denseblock1(expected.features[:4](images))
        deep = expected.features.denseblock2(expected.features.transition1(shallow))
    assert_close(outputs, {"shallow": shallow, "deep": deep})
    assert any(isinstance(module, densenet_efficient.modules.DenseBlock) for module in extractor.modules()) or not leaf
