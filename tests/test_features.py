"""Features at every stride, hooks, FX extraction and Grad-CAM: the naive model's, at every level of checkpointing."""

import copy

import pytest
import torch
from cases import LEVELS, MODES, assert_close, loss_of, make_images, make_pair, needs_native, randomise
from torch import nn
from torchvision.models import densenet
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names
from torchvision.ops import FeaturePyramidNetwork

from densenet_efficient import Backbone, EfficientDenseNet, convert, kernels
from densenet_efficient.kept import beside
from densenet_efficient.models import create_model

pytestmark = pytest.mark.usefixtures("one_thread", "nan_memory")

IMAGES = (3, 3, 33, 47)
FOUR_BLOCKS = {"growth_rate": 4, "block_config": (2, 3, 2, 2), "num_init_features": 6, "bn_size": 3, "num_classes": 5}
every_level = pytest.mark.parametrize("level", LEVELS)


def stepped(model, outputs, images):
    """The outputs, and what a backward through all of them leaves."""
    sum(loss_of(output) for output in outputs.values()).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {**outputs, "images": images.grad, **gradients, **dict(model.named_buffers())}


@every_level
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("arguments", [{}, FOUR_BLOCKS, {"small_inputs": True, "compression": 1.0}], ids=str)
def test_a_backbone_gives_the_naive_features(backend, arguments, mode, level):
    naive, efficient = make_pair(mode=mode, checkpointing=level, **arguments)
    backbone = Backbone(efficient)
    collector = IntermediateLayerGetter(naive.features, {name: name for name in backbone.names})
    results = []
    for model, run in ((naive, collector), (efficient, backbone)):
        images = make_images(2, 3, 64, 96).requires_grad_()
        results.append(stepped(model, run(images), images))
    assert_close(results[1], results[0])
    for name, channels, stride in zip(backbone.names, backbone.channels, backbone.strides, strict=True):
        assert results[1][name].shape == (2, channels, 64 // stride, 96 // stride)


@pytest.mark.parametrize("name", ["densenet121", "densenet161"])
def test_a_backbone_of_an_imagenet_network(name):
    with torch.device("meta"):
        backbone = Backbone(create_model(name).eval())
        maps = backbone(torch.empty(1, 3, 224, 224))
    assert backbone.strides == [4, 8, 16, 32]
    assert list(maps) == ["denseblock1", "denseblock2", "denseblock3", "norm5"]
    expected = [
        (1, channels, 224 // stride, 224 // stride)
        for channels, stride in zip(backbone.channels, backbone.strides, strict=True)
    ]
    assert [tuple(value.shape) for value in maps.values()] == expected


def test_a_backbone_shares_the_weights_of_its_model():
    model = EfficientDenseNet(**FOUR_BLOCKS)
    backbone = Backbone(model)
    assert all(key.startswith("features.") for key in backbone.state_dict())
    assert {id(value) for value in backbone.parameters()} == {id(value) for value in model.features.parameters()}


def test_a_backbone_of_something_else():
    with pytest.raises(TypeError, match="expected an EfficientDenseNet, got a Linear"):
        Backbone(nn.Linear(2, 2))


def retinanet(body, channels):
    """A detector of two classes on the pyramid of ``body``."""
    torch.manual_seed(0)
    backbone = nn.Sequential(body, FeaturePyramidNetwork(channels, 8))
    backbone.out_channels = 8
    anchors = AnchorGenerator(sizes=((8,), (16,), (32,), (64,)), aspect_ratios=((1.0,),) * 4)
    return RetinaNet(backbone, 2, anchor_generator=anchors, min_size=64, max_size=64)


@every_level
def test_a_retinanet_trains_a_step(backend, level):
    """The losses, and the gradients of torchvision's network under the same detector; `Backbone`, and converted."""
    torch.manual_seed(0)
    theirs = densenet.DenseNet(4, (2, 3, 2, 2), 6, 3, num_classes=5)
    randomise(theirs)
    ours = EfficientDenseNet(**FOUR_BLOCKS, checkpointing=level)
    ours.load_state_dict(theirs.state_dict())
    backbone = Backbone(ours)
    collector = IntermediateLayerGetter(theirs.features, {name: name for name in backbone.names})
    converted = copy.deepcopy(collector)
    results = []
    for body, features in ((collector, collector), (backbone, ours.features), (converted, converted)):
        detector = retinanet(body, backbone.channels).double()
        if body is converted:
            convert(detector, checkpointing=level)
        results.append(trained_a_step(detector, features))
    assert_close(results[1], results[0])
    assert_close(results[2], results[0])


def trained_a_step(detector, features):
    """The losses, and what they leave in ``features``, which the step changes."""
    target = {"boxes": torch.tensor([[4.0, 6.0, 30.0, 40.0]]).double(), "labels": torch.tensor([1])}
    losses = detector(list(make_images(2, 3, 64, 64)), [target, target])
    assert all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    before = features.conv0.weight.detach().clone()
    torch.optim.SGD(detector.parameters(), lr=0.01).step()
    assert not torch.equal(features.conv0.weight, before)
    gradients = {name: parameter.grad for name, parameter in features.named_parameters()}
    return {**losses, **gradients, **dict(features.named_buffers())}


@every_level
@pytest.mark.parametrize("path", ["denseblock1", "transition1", "denseblock1.denselayer2.conv1", "denseblock2"])
@pytest.mark.filterwarnings("ignore:a dense block runs layer by layer")
def test_full_backward_hooks_see_the_naive_gradients(backend, path, level):
    results = []
    for model in make_pair(checkpointing=level):
        for module in model.modules():
            if isinstance(module, nn.ReLU):
                module.inplace = False  # PyTorch refuses backward hooks around what works in place
        seen = {}
        module = model.features.get_submodule(path)
        module.register_full_backward_hook(
            lambda _, inputs, outputs, seen=seen: seen.update(inputs=inputs[0], outputs=outputs[0]) or None
        )
        loss_of(model(make_images(*IMAGES).requires_grad_())).backward()
        results.append(seen)
    assert results[0].keys() == {"inputs", "outputs"}
    assert_close(results[1], results[0])


NODES = {"features.denseblock1": "block", "features.transition1": "transition", "features.norm5": "last"}


@every_level
def test_fx_extraction_trains_like_the_naive_model(backend, level):
    naive, efficient = make_pair(checkpointing=level)
    with pytest.warns(UserWarning, match="torch.fx traces"):
        extractors = [create_feature_extractor(model, NODES) for model in (efficient, naive)]
    results = []
    for extractor in extractors:
        images = make_images(*IMAGES).requires_grad_()
        results.append(stepped(extractor, extractor(images), images))
    assert_close(*results)


@pytest.mark.filterwarnings("ignore:a dense block runs layer by layer")
def test_fx_names_what_torchvision_names():
    """So that "flatten" gives the same embedding."""
    arguments = {"growth_rate": 4, "block_config": (3, 2), "num_init_features": 6, "bn_size": 3}
    theirs, ours = densenet.DenseNet(**arguments).double(), EfficientDenseNet(**arguments).double()
    ours.load_state_dict(theirs.state_dict())
    assert get_graph_node_names(ours) == get_graph_node_names(theirs)
    images = make_images(*IMAGES)
    assert_close(*(create_feature_extractor(model, ["flatten"])(images) for model in (ours, theirs)))


@pytest.mark.filterwarnings("ignore:a dense block runs layer by layer")
@pytest.mark.parametrize("dims", [1, 3])
def test_fx_traces_every_number_of_dimensions(dims):
    model = EfficientDenseNet(4, (2, 2), 6, spatial_dims=dims).double().eval()
    images = make_images(2, 3, *(33,) * dims)
    extractor = create_feature_extractor(model, ["flatten", "classifier"])
    assert_close({"": extractor(images)["classifier"]}, {"": model(images)})


@needs_native
def test_features_alone_are_prepared_once(native_backend):
    """The last block runs without its norm there; both kept stages are looked for, and one is found."""
    _, model = make_pair(mode="eval")
    blocks = [module for name, module in model.features.named_children() if name.startswith("denseblock")]
    kept = []
    with torch.no_grad():
        for _ in range(3):
            model.features(make_images(*IMAGES))
            kept.append([beside(block).stage for block in blocks])
    assert all(stage is not None for stage in kept[0])
    assert kept[0] == kept[1] == kept[2]


def test_an_inference_keeps_no_features_that_nobody_asked_for(monkeypatch):
    """Of the stem, the transition and the last norm there are the outputs alone; of the features, all where asked."""
    _, efficient = make_pair(mode="eval")
    images, made, original = make_images(*IMAGES), [], kernels.empty_kept_images

    def empty_kept_images(like, *size):
        made.append(size)
        return original(like, *size)

    monkeypatch.setattr(kernels, "empty_kept_images", empty_kept_images)
    with torch.inference_mode():
        efficient(images)
        assert made == [(3, 6, 9, 12), (3, 9, 4, 6), (3, 17, 1, 1)]
        made.clear()
        Backbone(efficient)(images)
    assert (3, 18, 9, 12) in made and (3, 17, 4, 6) in made
