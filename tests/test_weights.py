"""Weights from files and from torchvision: every key accounted for, nothing executed, the model whole on an error."""

import copy
import pickle
from urllib.error import URLError

import pytest
import safetensors.torch
import timm.models._manipulate
import torch
import torchvision
from cases import SMALL, assert_close, make_images, randomise
from conversion_cases import make_model
from torchvision.models import DenseNet121_Weights

from densenet_efficient import EfficientDenseNet, EfficientDenseNet121, EfficientDenseNet264, load_weights

pytestmark = pytest.mark.usefixtures("one_thread")


def small(**arguments):
    torch.manual_seed(1)
    return EfficientDenseNet(**(SMALL | arguments)).double().eval()


def state_like(original, rename=lambda key: key):
    return {rename(key): value for key, value in original.state_dict().items()}


def old(key):
    for kind in ("norm", "relu", "conv"):
        key = key.replace(f".{kind}1.", f".{kind}.1.").replace(f".{kind}2.", f".{kind}.2.")
    return key


RENAMED = {
    "as it is": lambda key: key,
    "old": old,
    "DataParallel": lambda key: f"module.{key}",
    "compiled": lambda key: f"_orig_mod.{key}",
    "compiled and parallel": lambda key: f"module._orig_mod.{key}",
    "Lightning": lambda key: f"model.{key}",
    "Lightning, old": lambda key: f"model.{old(key)}",
    "Pleiss et al.": lambda key: key.replace("norm5", "norm_final"),
    "Pleiss et al., parallel": lambda key: f"module.{key}".replace("norm5", "norm_final"),
}


@pytest.mark.parametrize("source", ["torchvision", "MONAI", "torchxrayvision"])
@pytest.mark.parametrize("rename", RENAMED.values(), ids=RENAMED)
def test_every_spelling_of_the_keys(source, rename):
    original = make_model(source, "eval")
    model = small()
    assert load_weights(model, state_like(original, rename)) == []
    images = make_images(2, 3, 33, 47)
    assert_close({"": model(images)}, {"": original(images)})


def test_timm():
    original = make_model("timm", "eval")
    model = small(num_init_features=8)
    assert load_weights(model, original.state_dict()) == []
    images = make_images(2, 3, 33, 47)
    assert_close({"": model(images)}, {"": original(images)})


@pytest.mark.parametrize("container", [None, "state_dict", "model_state_dict", "model"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_files(tmp_path, container, suffix):
    original = make_model("torchvision", "eval")
    path = tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        safetensors.torch.save_file(original.state_dict(), path)
    else:
        state = original.state_dict()
        torch.save(state if container is None else {container: state, "epoch": 3}, path)
    model = small()
    load_weights(model, path)
    assert_close(model.state_dict(), original.state_dict(), 0)


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 7])
def test_other_input_channels_as_timm_adapts_them(channels):
    original = make_model("torchvision", "eval")
    model = small(in_channels=channels)
    notes = load_weights(model, original.state_dict())
    expected = timm.models._manipulate.adapt_input_conv(channels, original.features.conv0.weight.detach())
    torch.testing.assert_close(model.features.conv0.weight, torch.nn.Parameter(expected.double()), rtol=1e-6, atol=1e-7)
    assert notes == (
        [] if channels == 3 else [f"features.conv0.weight was adapted from 3 input channels to {channels}"]
    )


def test_another_number_of_classes():
    original = make_model("torchvision", "eval")
    model = small(num_classes=9)
    classifier = copy.deepcopy(model.classifier.state_dict())
    assert load_weights(model, original.state_dict()) == ["the classifier of 5 classes was not loaded: the model has 9"]
    assert_close(model.classifier.state_dict(), classifier, 0)
    assert_close(model.features.state_dict(), original.features.state_dict(), 0)


def test_another_number_of_classes_without_a_bias():
    original = make_model("torchvision", "eval")
    model = small()
    model.classifier = torch.nn.Linear(model.classifier.in_features, 9, bias=False)
    own = model.classifier.weight.detach().clone()
    assert load_weights(model, original.state_dict()) == ["the classifier of 5 classes was not loaded: the model has 9"]
    assert torch.equal(model.classifier.weight, own)
    assert_close(model.features.state_dict(), original.features.state_dict(), 0)


def test_weights_older_than_num_batches_tracked():
    original = make_model("torchvision", "eval")
    state = {key: value for key, value in original.state_dict().items() if "num_batches_tracked" not in key}
    model = small()
    load_weights(model, state)
    images = make_images(2, 3, 33, 47)
    assert_close({"": model(images)}, {"": original(images)})


def changed(change):
    state = make_model("torchvision").state_dict()
    change(state)
    return state


MISFITS = {
    "missing": (lambda state: state.pop("features.norm5.bias"), r"missing features\.norm5\.bias$"),
    "half a classifier": (lambda state: state.pop("classifier.weight"), r"missing classifier\.weight$"),
    "two input channels": (
        lambda state: state.update({"features.conv0.weight": torch.ones(6, 2, 7, 7)}),
        r"features\.conv0\.weight of shape \[6, 2, 7, 7\] instead of \[6, 3, 7, 7\]$",
    ),
    "unknown": (lambda state: state.update({"head.bias": torch.ones(2)}), r"unknown head\.bias$"),
    "shape": (
        lambda state: state.update({"features.norm5.bias": torch.ones(2)}),
        r"features\.norm5\.bias of shape \[2\] instead of \[17\]$",
    ),
    "all": (
        lambda state: [state.update({"a": torch.ones(1), "b": torch.ones(1)}), state.pop("features.norm0.weight")],
        r"unknown a; unknown b; missing features\.norm0\.weight$",
    ),
}


@pytest.mark.parametrize(("change", "message"), MISFITS.values(), ids=MISFITS)
def test_keys_that_do_not_fit(change, message):
    model = small()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        load_weights(model, changed(change))
    assert_close(model.state_dict(), before, 0)


def test_of_another_network_s_keys_some_are_named():
    state = EfficientDenseNet(growth_rate=4, block_config=(6, 8), num_init_features=6).state_dict()
    message = r"they have dense blocks of \[6, 8\] layers, the model of \[3, 2\]; unknown .*; and \d+ keys more$"
    with pytest.raises(ValueError, match=message) as raised:
        load_weights(small(), state)
    assert str(raised.value).count("denselayer") == 10


def test_one_weight_under_two_keys():
    """Which of them to load is the user's to say."""
    state = make_model("torchvision").state_dict()
    state |= {"model.classifier.bias": torch.ones(5), "features.norm_final.bias": torch.ones(17)}
    model = small()
    before = copy.deepcopy(model.state_dict())
    twice = r"features\.norm5\.bias: features\.norm5\.bias, features\.norm_final\.bias"
    with pytest.raises(ValueError, match=rf"keep one of each: {twice}; classifier\.bias: .*, model\.classifier\.bias$"):
        load_weights(model, state)
    assert_close(model.state_dict(), before, 0)


def test_what_stands_beside_the_weights():
    """torchxrayvision's thresholds, and torch's average of a model."""
    xray = make_model("torchxrayvision", "eval")
    expected = copy.deepcopy(xray.state_dict())
    xray.op_threshs = torch.rand(5)
    model = small()
    notes = load_weights(model, xray.state_dict())
    assert notes == ["op_threshs was not loaded: it is the thresholds by which torchxrayvision scales its outputs"]
    assert_close(model.state_dict(), expected, 0)
    average = torch.optim.swa_utils.AveragedModel(make_model("torchvision", "eval"))
    notes = load_weights(model, average.state_dict())
    assert notes == ["n_averaged was not loaded: it is the count of torch's AveragedModel"]
    assert_close(model.state_dict(), average.module.state_dict(), 0)


def test_what_stands_beside_the_weights_of_both():
    xray = make_model("torchxrayvision")
    xray.op_threshs = torch.rand(5)
    model = small()
    model.register_buffer("op_threshs", torch.zeros(5))
    assert load_weights(model, xray.state_dict()) == []
    assert torch.equal(model.op_threshs, xray.op_threshs)


class Dangerous:
    def __reduce__(self):
        return pytest.fail, ("code was executed",)


@pytest.mark.parametrize("content", [Dangerous(), {"state_dict": Dangerous()}])
def test_no_code_is_executed(tmp_path, content):
    path = tmp_path / "weights.pth"
    torch.save(content, path)
    with pytest.raises(ValueError, match=r"weights\.pth holds something else than tensors \(.*pytest") as raised:
        load_weights(small(), path)
    assert "weights_only" not in str(raised.value)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", pickle.dumps({"a": 1})])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_files_of_another_format(tmp_path, content, suffix):
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"weights\..*(no safetensors file|damaged, or no file)|no state_dict"):
        load_weights(small(), path)


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.99])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_half_a_download(tmp_path, kept, suffix):
    """A file that was cut off is named, and so is the remedy; torch's advice to run what is in it is not repeated."""
    path = tmp_path / f"weights{suffix}"
    save = safetensors.torch.save_file if suffix == ".safetensors" else torch.save
    save(small().state_dict(), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * kept)])
    model = small()
    with pytest.raises(ValueError, match=r"weights\.(safetensors is no|pth is damaged, or no file)") as raised:
        load_weights(model, path)
    assert "weights_only" not in str(raised.value)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".h5"])
def test_an_absent_file_is_named(tmp_path, suffix):
    with pytest.raises(FileNotFoundError, match=rf"absent\{suffix}"):
        load_weights(small(), tmp_path / f"absent{suffix}")


@pytest.mark.parametrize("content", [{}, {"epoch": 3}, [1, 2]])
def test_no_state_dict(content):
    with pytest.raises(ValueError, match="found no state_dict"):
        load_weights(small(), content)


@pytest.fixture
def weights_of_torchvision(monkeypatch):
    """A model of torchvision whose weights stand in for those to download."""
    theirs = torchvision.models.densenet121().eval()
    randomise(theirs)

    def state(*args, weights_only, **kwargs):
        assert weights_only
        return {old(key): value for key, value in theirs.state_dict().items()}  # as in torchvision's files

    monkeypatch.setattr(DenseNet121_Weights, "get_state_dict", state)
    return theirs


@pytest.mark.parametrize(
    "weights", ["IMAGENET1K_V1", "DEFAULT", "DenseNet121_Weights.DEFAULT", DenseNet121_Weights.IMAGENET1K_V1]
)
def test_weights_of_torchvision(weights_of_torchvision, weights):
    model = EfficientDenseNet121(weights=weights)
    assert_close(model.state_dict(), weights_of_torchvision.state_dict(), 0)
    assert model.weights is DenseNet121_Weights.IMAGENET1K_V1
    assert model.weights.transforms().crop_size == [224]
    assert EfficientDenseNet121().weights is None


def test_the_former_name_of_weights(weights_of_torchvision):
    with pytest.warns(UserWarning, match="^pretrained is deprecated; give weights='IMAGENET1K_V1'"):
        model = EfficientDenseNet121(pretrained=True)
    assert_close(model.state_dict(), weights_of_torchvision.state_dict(), 0)
    with pytest.warns(UserWarning, match="^pretrained is deprecated"):
        assert EfficientDenseNet121(pretrained=False).weights is None
    with pytest.raises(TypeError, match="give one of them"):
        EfficientDenseNet121(weights="DEFAULT", pretrained=True)


def test_weights_of_torchvision_with_other_classes(weights_of_torchvision):
    model = EfficientDenseNet121(weights="DEFAULT", num_classes=3, in_channels=1)
    assert_close(model.features.denseblock1.state_dict(), weights_of_torchvision.features.denseblock1.state_dict(), 0)


@pytest.mark.parametrize("weights", ["IMAGENET21K", torchvision.models.DenseNet201_Weights.DEFAULT, 3])
def test_unknown_weights(weights):
    with pytest.raises(ValueError, match=r"unknown weights .* for densenet121; expected one of IMAGENET1K_V1"):
        EfficientDenseNet121(weights=weights)


def test_a_network_that_torchvision_has_not():
    with pytest.raises(ValueError, match="torchvision has no weights for densenet264"):
        EfficientDenseNet264(weights="DEFAULT")


def test_offline(monkeypatch):
    def refuse(*args, **kwargs):
        raise URLError("no network")

    monkeypatch.setattr(DenseNet121_Weights, "get_state_dict", refuse)
    with pytest.raises(RuntimeError, match=r"no network\); put densenet121-\w+\.pth into .*checkpoints"):
        EfficientDenseNet121(weights="DEFAULT")
