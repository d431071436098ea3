"""Feature maps, Grad-CAM, filters and the reuse of features, as of the naive model; and their pictures."""

import copy
import csv
import re

import pytest
import torch
from cases import LEVELS, SMALL, assert_close, make_images, make_pair
from conversion_cases import make_models, monai_densenet2d
from PIL import Image

from densenet_efficient import EfficientDenseNet, convert, load_weights, models
from densenet_efficient.cli import main
from densenet_efficient.inspection import feature_maps, feature_reuse, first_filters, grad_cam
from densenet_efficient.models import create_model
from densenet_efficient.training.checkpoint import MODEL_PREFIX, SavedClassifier, describe_classifier
from densenet_efficient.training.preprocessing import Preprocessing, normalisation
from densenet_efficient.weights import pretrained
from densenet_efficient.weights.checkpoints import ENTRY

pytestmark = pytest.mark.usefixtures("one_thread")

IMAGES = (3, 3, 33, 47)
LAYERS = [
    "features",
    *(f"features.{name}" for name in ("conv0", "norm0", "relu0", "pool0", "denseblock1", "transition1", "norm5")),
    *(f"features.denseblock1.denselayer2{name}" for name in ("", ".norm1", ".relu1", ".conv1", ".norm2", ".conv2")),
    "features.transition1.norm",
    "features.transition1.conv",
]
every_layer = pytest.mark.parametrize("layer", LAYERS)
every_level = pytest.mark.parametrize("level", LEVELS)


@every_level
@every_layer
def test_feature_maps_are_the_naive_model_s(backend, layer, level):
    """Also where an in-place ReLU follows."""
    naive, efficient = make_pair(mode="eval", checkpointing=level)
    images = make_images(*IMAGES)
    assert_close({"": feature_maps(efficient, images, layer)}, {"": feature_maps(naive, images, layer)})


@every_level
@every_layer
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_grad_cam_is_the_naive_model_s(backend, layer, level, mode):
    images, classes = make_images(*IMAGES), torch.tensor([1, 4, 0])
    results = []
    for model in make_pair(mode=mode, checkpointing=level):
        given, predicted = grad_cam(model, images, layer, classes), grad_cam(model, images, layer)
        assert given.min() >= 0
        assert given.max() <= 1
        assert not any(parameter.grad is not None for parameter in model.parameters())
        assert not any(module._forward_hooks for module in model.modules())
        results.append({"given": given, "predicted": predicted})
    assert_close(results[1], results[0])


@every_level
@pytest.mark.parametrize("layer", ["features", "features.denseblock1", "features.transition1"])
@pytest.mark.parametrize("library", ["torchvision", "timm", "MONAI", "torchxrayvision"])
def test_grad_cam_of_a_converted_model(backend, library, layer, level):
    original, converted = make_models(library, "eval")
    convert(converted, checkpointing=level)
    images, classes = make_images(*IMAGES), torch.tensor([1, 4, 0])
    maps = [grad_cam(model, images, layer, classes) for model in (converted, original)]
    assert_close({"": maps[0]}, {"": maps[1]})


@every_level
@pytest.mark.parametrize(("dims", "size"), [(1, (70,)), (3, (17, 19, 33))])
def test_signals_and_volumes(backend, dims, size, level):
    """All four, as of MONAI's network, which is converted too."""
    torch.manual_seed(0)
    original = monai_densenet2d(dims).double().eval()
    converted, own = copy.deepcopy(original), EfficientDenseNet(**SMALL, spatial_dims=dims, checkpointing=level)
    load_weights(own.double().eval(), original.state_dict())
    convert(converted, checkpointing=level)
    images = make_images(2, 3, *size)
    maps, cams = (
        [inspect(model, images, "features.denseblock1") for model in (original, converted, own)]
        for inspect in (feature_maps, grad_cam)
    )
    assert maps[0].dim() == cams[0].dim() + 1 == 2 + dims
    for values in (maps, cams):
        assert_close({"": values[1]}, {"": values[0]})
        assert_close({"": values[2]}, {"": values[0]})
    assert torch.equal(first_filters(own), original.features.conv0.weight)
    reuses = [feature_reuse(model) for model in (converted, own)]
    for name, reuse in reuses[0].items():
        torch.testing.assert_close(reuse, reuses[1][name], rtol=0, atol=0, equal_nan=True)


def test_grad_cam_by_hand():
    """Behind the last features stand ReLU, mean and classifier: the gradient is a row of it where they are positive."""
    _, model = make_pair(mode="eval")
    images, classes = make_images(*IMAGES), torch.tensor([1, 4, 0])
    features = model.features(images)
    share = (features > 0).double().mean((2, 3)) / features[0, 0].numel()
    weighted = torch.einsum("nchw,nc->nhw", features, model.classifier.weight[classes] * share).relu()
    expected = weighted / weighted.amax((1, 2), keepdim=True)
    assert_close({"": grad_cam(model, images, classes=classes)}, {"": expected})


def test_grad_cam_needs_no_gradients_elsewhere():
    _, model = make_pair(mode="eval")
    images = make_images(*IMAGES)
    expected = grad_cam(model, images)
    assert not images.requires_grad
    with torch.no_grad():
        assert_close({"": grad_cam(model, images)}, {"": expected})
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    assert_close({"": grad_cam(model, images)}, {"": expected})


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ("features.denseblok1", r"no layer 'features.denseblok1'.*close: features.denseblock"),
        ("", "no layer ''"),
        ("classifier", r"gives no feature maps \[N, C, H, W\] but \(3, 5\)"),
    ],
)
@pytest.mark.parametrize("inspect", [feature_maps, grad_cam])
def test_layers_that_give_no_maps(inspect, layer, message):
    _, model = make_pair(mode="eval")
    with pytest.raises(ValueError, match=message):
        inspect(model, make_images(*IMAGES), layer)
    assert not any(module._forward_hooks for module in model.modules())


def test_a_layer_that_is_not_called():
    _, model = make_pair(mode="eval")
    model.spare = torch.nn.Conv2d(1, 1, 1)
    with pytest.raises(ValueError, match="does not call spare"):
        feature_maps(model, make_images(*IMAGES), "spare")


@pytest.mark.parametrize("classes", [[0, 1, 5], [-1, 0, 0]])
def test_classes_that_the_model_lacks(classes):
    _, model = make_pair(mode="eval")
    with pytest.raises(ValueError, match="expected classes from 0 to 4"):
        grad_cam(model, make_images(*IMAGES), classes=torch.tensor(classes))


def test_classes_that_are_not_one_per_image():
    _, model = make_pair(mode="eval")
    with pytest.raises(ValueError, match=r"one class for each of 3 images, got \[1\]"):
        grad_cam(model, make_images(*IMAGES), classes=torch.tensor([1]))
    given = {"images": make_images(*IMAGES), "classes": [0, 1, 2]}
    assert torch.equal(grad_cam(model, **given), grad_cam(model, **given | {"classes": torch.tensor([0, 1, 2])}))


def test_a_hook_of_one_s_own_is_still_announced(recwarn):
    _, model = make_pair(mode="eval")
    layer = "features.denseblock1.denselayer1"
    feature_maps(model, make_images(*IMAGES), layer)
    assert not recwarn.list
    model.get_submodule(layer).register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match="layer by layer"):
        model(make_images(*IMAGES))


@pytest.mark.parametrize("bottleneck", [True, False])
def test_feature_reuse(bottleneck):
    """Each entry is the mean absolute weight over the source's channels; the classifier reads the last block."""
    _, model = make_pair(bottleneck=bottleneck)
    reuse = feature_reuse(model)
    assert list(reuse) == ["denseblock1", "denseblock2"]
    first = reuse["denseblock1"]
    assert first.shape == (4, 4)  # 6 channels and three layers of 4
    third = model.features.denseblock1["denselayer3"].conv1.weight
    assert first[0, 2].item() == pytest.approx(third[:, :6].abs().mean().item())
    assert first[2, 2].item() == pytest.approx(third[:, 10:14].abs().mean().item())
    assert first[3, 3].item() == pytest.approx(model.features.transition1.conv.weight[:, 14:18].abs().mean().item())
    assert torch.equal(first.isnan(), torch.ones(4, 4).tril(-1).bool())
    last = model.classifier.weight[:, -4:].abs().mean().item()
    assert reuse["denseblock2"][-1, -1].item() == pytest.approx(last)


def test_feature_reuse_of_a_converted_model():
    _, model = make_models("torchvision")
    with pytest.raises(ValueError, match="found no dense block"):
        feature_reuse(model)
    convert(model)
    assert feature_reuse(model)["denseblock1"].shape == (4, 4)


def test_feature_reuse_of_a_changed_block():
    _, model = make_pair()
    model.features.denseblock1["denselayer2"].conv1 = torch.nn.Identity()
    with pytest.raises(ValueError, match=r"cannot attribute the weights of denseblock1.*denselayer2"):
        feature_reuse(model)


def test_feature_reuse_without_a_classifier():
    _, model = make_pair()
    model.classifier = torch.nn.Identity()
    with pytest.raises(ValueError, match="nothing behind denseblock2 has weights for its 17 channels"):
        feature_reuse(model)


def test_first_filters():
    _, model = make_pair()
    assert torch.equal(first_filters(model), model.features.conv0.weight)
    with pytest.raises(ValueError, match="has no convolution"):
        first_filters(model.classifier)


# The command


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Of the smallest network for digits, and an image beside it."""
    folder = tmp_path_factory.mktemp("subject")
    model = create_model("densenet-bc-40-12", in_channels=1)
    preprocessing = Preprocessing(1, 16, *normalisation(1))
    classifier = SavedClassifier(model, [f"digit {index}" for index in range(10)], False, preprocessing)
    state = {f"{MODEL_PREFIX}{name}": value for name, value in model.state_dict().items()}
    torch.save({ENTRY: describe_classifier(classifier), "state_dict": state}, folder / "checkpoint.pt")
    Image.effect_noise((40, 30), 80).save(folder / "image.png")
    return folder / "checkpoint.pt"


@pytest.mark.parametrize(
    ("arguments", "printed"),
    [
        (["maps", "IMAGE"], "features.denseblock1: 64 of 96 channels, 16x16"),
        (["maps", "IMAGE", "--layer", "features.conv0", "--channels", "5"], "features.conv0: 5 of 24 channels"),
        (["grad-cam", "IMAGE"], "Grad-CAM of features for digit"),
        (["grad-cam", "IMAGE", "--class", "digit 3"], "for digit 3 ("),
        (["grad-cam", "IMAGE", "--class", "4", "--layer", "features.denseblock2"], "denseblock2 for digit 4 ("),
        (["filters"], "first convolution: 24 filters of 3x3"),
        (["reuse"], "feature reuse of 3 blocks"),
    ],
)
def test_pictures_of_a_checkpoint(checkpoint, arguments, printed, tmp_path, capsys):
    arguments = [str(checkpoint.with_name("image.png")) if each == "IMAGE" else each for each in arguments]
    output = tmp_path / "picture.png"
    assert main(["visualize", *arguments, "--checkpoint", str(checkpoint), "--output", str(output)]) == 0
    assert printed in capsys.readouterr().out
    with Image.open(output) as picture:
        assert picture.format == "PNG"
        assert len(picture.convert("RGB").getcolors(maxcolors=2**24)) > 20  # something is drawn


def test_pictures_of_a_fresh_network(checkpoint, tmp_path):
    output = tmp_path / "picture.png"
    image = str(checkpoint.with_name("image.png"))
    arguments = ["--model", "densenet-bc-40-12", "--image_size", "32", "--output", str(output)]
    assert main(["visualize", "grad-cam", image, *arguments]) == 0
    assert output.is_file()


def test_pictures_of_pretrained_weights(tmp_path, monkeypatch, capsys):
    """Their class names are known; the download is in test_weights.py."""
    monkeypatch.setattr(pretrained, "download", lambda *_: models.EfficientDenseNet121().state_dict())
    Image.new("RGB", (40, 30), "red").save(tmp_path / "image.png")
    arguments = [str(tmp_path / "image.png"), "--model", "densenet121", "--weights", "DEFAULT", "--image_size", "32"]
    output = ["--output", str(tmp_path / "picture.png")]
    assert main(["visualize", "grad-cam", *arguments, "--class", "tench", *output]) == 0
    assert "for tench (" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["reuse", "--model", "densenet-1"], "unknown model 'densenet-1'"),
        (
            ["reuse", "--model", "densenet-bc-40-12", "--weights", "DEFAULT"],
            "torchvision has no weights for densenet-bc",
        ),
        (["reuse", "--model", "densenet121", "--weights", "NONE"], "unknown weights 'NONE' for densenet121"),
        (["reuse", "--checkpoint", "nowhere.pt"], "nowhere.pt: No such file"),
        (
            ["maps", "IMAGE", "--checkpoint", "CHECKPOINT", "--layer", "features.denseblock9"],
            "no layer 'features.denseblock9'",
        ),
        (["maps", "nowhere.png", "--checkpoint", "CHECKPOINT"], "nowhere.png: No such file"),
        (["grad-cam", "IMAGE", "--checkpoint", "CHECKPOINT", "--class", "digit 11"], "unknown class 'digit 11'"),
        (["grad-cam", "IMAGE", "--checkpoint", "CHECKPOINT", "--layer", "classifier"], "gives no feature maps"),
        (["reuse", "--checkpoint", "CHECKPOINT", "--weights", "DEFAULT"], "--weights goes with --model"),
        (["reuse", "--checkpoint", "CHECKPOINT", "--image_size", "32"], "--image_size goes with --model"),
    ],
)
def test_the_command_names_what_is_wrong(checkpoint, arguments, message, tmp_path, capsys):
    files = {"IMAGE": str(checkpoint.with_name("image.png")), "CHECKPOINT": str(checkpoint)}
    arguments = [files.get(each, each) for each in arguments]
    assert main(["visualize", *arguments, "--output", str(tmp_path / "picture.png")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("output", "message"), [("picture.jpg", "ends in .png"), ("nowhere/picture.png", "no such folder")]
)
def test_outputs_that_cannot_be_written(checkpoint, output, message, tmp_path, capsys):
    assert main(["visualize", "reuse", "--checkpoint", str(checkpoint), "--output", str(tmp_path / output)]) == 2
    assert message in capsys.readouterr().err


def test_images_are_shown_as_they_were():
    image = torch.rand(1, 3, 8, 8)
    preprocessing = Preprocessing(3, 8, *normalisation(3))
    mean, std = (torch.tensor(values)[:, None, None] for values in (preprocessing.mean, preprocessing.std))
    torch.testing.assert_close(preprocessing.shown((image - mean) / std), image)


def test_the_probability_of_one_of_several_labels(checkpoint, tmp_path, capsys):
    """As `predict` has it."""
    content = torch.load(checkpoint)
    content[ENTRY]["multi_label"] = True
    torch.save(content, tmp_path / "several.pt")
    image = str(checkpoint.with_name("image.png"))
    given = [image, "--checkpoint", str(tmp_path / "several.pt")]
    assert main(["visualize", "grad-cam", *given, "--class", "digit 3", "--output", str(tmp_path / "cam.png")]) == 0
    shown = re.search(r"for digit 3 \((.*)\)", capsys.readouterr().out).group(1)
    assert main(["predict", *given, "--output", str(tmp_path / "out.csv"), "--accelerator", "cpu"]) == 0
    [row] = csv.DictReader((tmp_path / "out.csv").read_text().splitlines())
    assert shown == f"{float(row['digit 3']):.1%}"
