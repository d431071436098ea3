"""from_pretrained, save_pretrained and push_to_hub: every source there is, on files that stand in for downloads."""

import copy
import importlib
import json
import subprocess
import sys

import huggingface_hub
import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torchvision
from cases import SMALL, assert_close, make_images, randomise
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from PIL import Image
from torchvision.models import DenseNet121_Weights, DenseNet201_Weights
from torchvision.transforms import InterpolationMode
from torchvision.transforms._presets import ImageClassification

import densenet_efficient.timm  # noqa: F401 (registers)
from densenet_efficient import EfficientDenseNet, EfficientDenseNet121, EfficientDenseNet201, load_weights
from densenet_efficient.models import cifar_densenet
from densenet_efficient.optional import needed
from densenet_efficient.weights.preprocessing import Preprocessing

pytestmark = pytest.mark.usefixtures("one_thread")
PREPROCESSING = Preprocessing(40, 32, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), "bicubic")


def small(**arguments):
    torch.manual_seed(1)
    model = EfficientDenseNet(**(SMALL | arguments))
    randomise(model)
    return model.eval()


@pytest.fixture(scope="module")
def timms():
    """timm's DenseNet-121 with random weights."""
    torch.manual_seed(0)
    model = timm.create_model("densenet121", num_classes=11).eval()
    randomise(model)
    return model


def put_in_cache(cache, repository, files, revision="main", commit="0" * 40):
    """As huggingface_hub keeps what it downloaded."""
    root = cache / f"models--{repository.replace('/', '--')}"
    folder = root / "snapshots" / commit
    folder.mkdir(parents=True)
    (root / "refs").mkdir()
    (root / "refs" / revision).write_text(commit)
    write(folder, files)


def write(folder, files):
    for name, content in files.items():
        if name.endswith(".json"):
            (folder / name).write_text(json.dumps(content))
        elif name.endswith(".safetensors"):
            safetensors.torch.save_file(content, folder / name)
        else:
            torch.save(content, folder / name)


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """An empty cache, and no network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def config_of_timm(model, **changes):
    """As timm.models.push_to_hf_hub writes it."""
    description = {"architecture": "densenet121", "num_classes": model.num_classes, "global_pool": "avg"}
    return description | {"pretrained_cfg": model.pretrained_cfg} | changes


@pytest.mark.parametrize("prefix", ["", "timm/", "hf-hub:timm/"])
@pytest.mark.parametrize("network", [EfficientDenseNet, EfficientDenseNet121])
def test_tags_of_timm(cache, timms, prefix, network):
    files = {"config.json": config_of_timm(timms), "model.safetensors": timms.state_dict()}
    put_in_cache(cache, "timm/densenet121.ra_in1k", files)
    source, config = f"{prefix}densenet121.ra_in1k", timms.pretrained_cfg
    model = network.from_pretrained(source)
    assert type(model) is EfficientDenseNet121
    assert not model.training
    assert model.config["num_classes"] == 11
    assert_close(model.state_dict(), timms.state_dict(), 0)
    assert model.weights == Preprocessing(256, 224, config["mean"], config["std"], "bicubic")
    with pytest.warns(UserWarning, match=r"^the classifier of 11 classes was not loaded.*from 3 input channels to 1$"):
        model = network.from_pretrained(source, num_classes=2, in_channels=1, memory_efficient=False)
    assert model.checkpointing == "none"


def test_an_older_description_of_timm(cache, timms):
    """In one level."""
    config = timms.pretrained_cfg | {"architecture": "densenet121", "num_classes": timms.num_classes}
    put_in_cache(cache, "me/mine", {"config.json": config, "pytorch_model.bin": timms.state_dict()})
    model = EfficientDenseNet.from_pretrained("me/mine")
    assert_close(model.state_dict(), timms.state_dict(), 0)
    assert model.weights == Preprocessing.of_timm(timms.pretrained_cfg)


def test_transforms_of_timm(timms):
    config = timms.pretrained_cfg | {"crop_pct": 0.9}
    theirs = timm.data.create_transform(**timm.data.resolve_data_config(pretrained_cfg=config))
    generator = np.random.default_rng(0)
    image = Image.fromarray(generator.integers(0, 255, (301, 333, 3), dtype=np.uint8))
    torch.testing.assert_close(Preprocessing.of_timm(config).transforms()(image), theirs(image))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_size": (3, 224, 192)}, "expected a square crop from the centre"),
        ({"crop_mode": "border"}, "expected a square crop from the centre"),
    ],
)
def test_transforms_of_timm_that_are_not_the_same(timms, changes, message):
    with pytest.raises(ValueError, match=message):
        Preprocessing.of_timm(timms.pretrained_cfg | changes)


def test_a_model_that_was_registered_here(cache):
    theirs = timm.create_model("efficient_densenet121", num_classes=2)
    config = config_of_timm(
        theirs, architecture="efficient_densenet121", model_args={"drop_rate": 0.1, "global_pool": "avg"}
    )
    put_in_cache(cache, "me/mine", {"config.json": config, "pytorch_model.bin": theirs.state_dict()})
    model = EfficientDenseNet.from_pretrained("me/mine")
    assert_close(model.state_dict(), theirs.state_dict(), 0)
    again = timm.create_model("hf-hub:me/mine", pretrained=True, cache_dir=cache)
    assert_close(again.state_dict(), theirs.state_dict(), 0)


NOT_OURS = {
    "resnet": (
        {"architecture": "resnet50"},
        r"me/mine is a resnet50; EfficientDenseNet.* builds densenet121, ",
    ),
    "blur": ({"architecture": "densenetblur121d"}, "me/mine is a densenetblur121d; EfficientDenseNet"),
    "pooling": ({"global_pool": "max"}, "me/mine has global_pool='max', which EfficientDenseNet has not; timm.create"),
    "arguments": ({"model_args": {"stem_type": "deep", "proj_drop_rate": 0.1}}, "me/mine has stem_type='deep', which"),
    "incomplete": ({"pretrained_cfg": {}}, r"config\.json of me/mine is not as timm writes it: 'input_size'"),
}


@pytest.mark.parametrize(("changes", "message"), NOT_OURS.values(), ids=NOT_OURS)
def test_other_networks_of_timm(cache, timms, changes, message):
    put_in_cache(cache, "me/mine", {"config.json": config_of_timm(timms, **changes)})
    with pytest.raises(ValueError, match=message):
        EfficientDenseNet.from_pretrained("me/mine")


def test_a_class_with_another_number(cache, timms):
    put_in_cache(cache, "me/mine", {"config.json": config_of_timm(timms)})
    with pytest.raises(
        ValueError, match=r"is a densenet121; EfficientDenseNet201\.from_pretrained builds densenet201$"
    ):
        EfficientDenseNet201.from_pretrained("me/mine")


SAVED = {
    "small": (lambda: small(drop_rate=0.1, in_channels=2, norm_eps=1e-3), EfficientDenseNet),
    "CIFAR": (lambda: cifar_densenet(10, 4, checkpointing="none"), EfficientDenseNet),
    "121": (lambda: EfficientDenseNet121(num_classes=3), EfficientDenseNet121),
}


@pytest.mark.parametrize(("make", "network"), SAVED.values(), ids=SAVED)
def test_save_and_load(tmp_path, make, network):
    model = make().to(memory_format=torch.channels_last)
    model.weights = PREPROCESSING
    assert model.save_pretrained(tmp_path / "new" / "folder") is None
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    for source in (tmp_path / "new" / "folder", str(tmp_path / "new" / "folder")):
        again = network.from_pretrained(source)
        assert type(again) is network
        assert again.config == model.config
        assert again.weights == PREPROCESSING
        assert_close(again.state_dict(), model.state_dict(), 0)
    card = huggingface_hub.ModelCard.load(tmp_path / "new" / "folder" / "README.md")
    assert card.data.library_name == "densenet_efficient"
    assert {"densenet", "pytorch_model_hub_mixin"} <= set(card.data.tags)
    assert card.data.pipeline_tag == "image-classification"
    assert "EfficientDenseNet.from_pretrained" in card.text and "https://arxiv.org/abs/1608.06993" in card.text


@pytest.mark.parametrize(("options", "level"), [({}, "bottleneck"), ({"memory_efficient": False}, "none")])
def test_the_memory_flag_wins_over_the_level_that_was_saved(tmp_path, options, level):
    small(checkpointing="bottleneck").save_pretrained(tmp_path)
    assert EfficientDenseNet.from_pretrained(tmp_path, **options).checkpointing == level


def test_the_preprocessing_of_torchvision_is_saved(tmp_path):
    model = small()
    model.weights = DenseNet121_Weights.DEFAULT
    model.save_pretrained(tmp_path)
    again = EfficientDenseNet.from_pretrained(tmp_path).weights.transforms()
    images = make_images(1, 3, 300, 280).clamp(0, 1).float()
    torch.testing.assert_close(again(images), DenseNet121_Weights.DEFAULT.transforms()(images))


@pytest.mark.parametrize(
    "options", [{}, {"interpolation": InterpolationMode.BICUBIC}], ids=["torchvision's", "bicubic"]
)
def test_the_interpolation_is_that_of_the_transforms(options):
    theirs = ImageClassification(crop_size=16, resize_size=20, **options)
    ours = Preprocessing.of_transforms(theirs)
    assert ours.transforms().interpolation == theirs.interpolation
    defaults = Preprocessing(20, 16, ours.mean, ours.std)
    assert (defaults == ours) == (not options)


def test_huggingfaces_own_mixin_reads_and_writes_the_same(tmp_path):
    class Theirs(huggingface_hub.PyTorchModelHubMixin, EfficientDenseNet):
        pass

    ours = small()
    ours.save_pretrained(tmp_path / "ours")
    theirs = Theirs.from_pretrained(tmp_path / "ours")
    assert_close(theirs.state_dict(), ours.state_dict(), 0)
    theirs.save_pretrained(tmp_path / "theirs")
    again = EfficientDenseNet.from_pretrained(tmp_path / "theirs")
    assert again.config == ours.config
    assert_close(again.state_dict(), ours.state_dict(), 0)


def test_push_to_hub(monkeypatch):
    uploads = []

    def create_repo(api, repo_id, **options):
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

    def upload_folder(api, *, repo_id, folder_path, **options):
        uploads.append((repo_id, EfficientDenseNet.from_pretrained(folder_path)))
        return "the commit"

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
    model = small()
    assert model.push_to_hub("me/mine", private=True) == "the commit"
    ((name, uploaded),) = uploads
    assert name == "me/mine"
    assert_close(uploaded.state_dict(), model.state_dict(), 0)


@pytest.mark.parametrize("source", ["me/mine", "me/mine@v1"])
@pytest.mark.parametrize("filename", ["model.safetensors", "pytorch_model.bin"])
def test_a_repository_of_the_hub(cache, source, filename):
    original = small()
    revision = source.partition("@")[2] or "main"
    put_in_cache(cache, "me/mine", {"config.json": original.config, filename: original.state_dict()}, revision)
    assert_close(EfficientDenseNet.from_pretrained(source).state_dict(), original.state_dict(), 0)
    revised = EfficientDenseNet.from_pretrained("me/mine", revision=revision, local_files_only=True)
    assert_close(revised.state_dict(), original.state_dict(), 0)
    named = EfficientDenseNet.from_pretrained(f"me/mine@{revision}", revision="another")
    assert_close(named.state_dict(), original.state_dict(), 0)


def test_offline_the_error_says_which_file_to_put_where(cache):
    with pytest.raises(RuntimeError) as raised:
        EfficientDenseNet.from_pretrained("me/mine")
    folder = cache / "models--me--mine" / "snapshots" / "main"
    message = str(raised.value)
    assert message.startswith(f"cannot download {huggingface_hub.hf_hub_url('me/mine', 'config.json')}, ")
    assert message.endswith(f"put config.json and model.safetensors into {folder}")
    folder.mkdir(parents=True)
    original = small()
    write(folder, {"config.json": original.config})
    with pytest.raises(RuntimeError, match=r"cannot download .*/model\.safetensors, and"):
        EfficientDenseNet.from_pretrained("me/mine")
    write(folder, {"model.safetensors": original.state_dict()})
    assert_close(EfficientDenseNet.from_pretrained("me/mine").state_dict(), original.state_dict(), 0)


class AbsentError(EntryNotFoundError):
    def __init__(self):
        """Without the response that Hugging Face's own wants."""


def test_the_hub_is_asked_with_what_the_user_says(monkeypatch, tmp_path):
    asked = []

    def download(repository, name, **options):
        asked.append((repository, name, options))
        raise AbsentError if name == "config.json" else LocalEntryNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(RuntimeError, match="cannot download"):
        EfficientDenseNet121.from_pretrained("me/mine", token="secret", cache_dir=tmp_path, force_download=True)
    assert [name for _, name, _ in asked] == ["config.json", "model.safetensors", "pytorch_model.bin"]
    assert all(options["token"] == "secret" and options["force_download"] for _, _, options in asked)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_files(tmp_path, suffix):
    theirs = torchvision.models.DenseNet(4, (3, 2), 6, 3, num_classes=5)
    path = tmp_path / f"weights{suffix}"
    write(tmp_path, {path.name: theirs.state_dict()})
    for source in (path, str(path)):
        model = EfficientDenseNet.from_pretrained(source, **SMALL)
        assert_close(model.state_dict(), theirs.state_dict(), 0)
        assert model.weights is None
    with pytest.warns(UserWarning, match=r"^the classifier of 5 classes was not loaded: the model has 2$"):
        EfficientDenseNet.from_pretrained(path, **(SMALL | {"num_classes": 2}))


@pytest.fixture
def downloads(monkeypatch):
    state = torchvision.models.densenet121().state_dict()
    monkeypatch.setattr(DenseNet121_Weights, "get_state_dict", lambda *args, **kwargs: state)
    return state


@pytest.mark.parametrize("network", [EfficientDenseNet, EfficientDenseNet121])
@pytest.mark.parametrize("source", [DenseNet121_Weights.DEFAULT, "DenseNet121_Weights.IMAGENET1K_V1"])
def test_weights_of_torchvision(downloads, network, source):
    model = network.from_pretrained(source)
    assert type(model) is EfficientDenseNet121
    assert model.weights is DenseNet121_Weights.IMAGENET1K_V1
    assert_close(model.state_dict(), downloads, 0)


def test_weights_of_torchvision_by_their_name_alone(downloads):
    assert_close(EfficientDenseNet121.from_pretrained("IMAGENET1K_V1").state_dict(), downloads, 0)
    with pytest.raises(ValueError, match="'IMAGENET1K_V1' names no network; call from_pretrained of a class"):
        EfficientDenseNet.from_pretrained("IMAGENET1K_V1")
    for other in (DenseNet201_Weights.DEFAULT, "DenseNet201_Weights.DEFAULT"):
        with pytest.raises(ValueError, match=r"unknown weights .*DenseNet201_Weights.* for densenet121"):
            EfficientDenseNet121.from_pretrained(other)


UNKNOWN = {
    "name": ("densenet121", ValueError, "unknown weights 'densenet121'; expected a name of torchvision's weights"),
    "type": (3, TypeError, "expected a name of torchvision's .*; got a int"),
    "file": ("weights.pth", FileNotFoundError, r"there is no file weights\.pth"),
}


@pytest.mark.parametrize(("source", "error", "message"), UNKNOWN.values(), ids=UNKNOWN)
def test_unknown_sources(source, error, message):
    with pytest.raises(error, match=message):
        EfficientDenseNet121.from_pretrained(source)


BAD_FOLDERS = {
    "nothing": ({}, EfficientDenseNet, ValueError, r"has no config\.json; call from_pretrained of a class"),
    "no weights": ({}, EfficientDenseNet121, FileNotFoundError, r"neither model\.safetensors nor pytorch_model\.bin"),
    "list": ({"config.json": [1]}, EfficientDenseNet, ValueError, r"config\.json of .* holds a list"),
    "unknown": ({"config.json": {"model_type": "resnet"}}, EfficientDenseNet, TypeError, "cannot be built.*model_type"),
    "value": ({"config.json": {"growth_rate": -1}}, EfficientDenseNet, ValueError, "cannot be built: growth_rate must"),
    "other": (
        {"config.json": EfficientDenseNet(**SMALL).config},
        EfficientDenseNet121,
        ValueError,
        r"is no EfficientDenseNet121: it has growth_rate=4, block_config=\[3, 2\], num_init_features=6$",
    ),
    "preprocessing": (
        {"config.json": SMALL | {"preprocessing": {"mean": [0.5]}}},
        EfficientDenseNet,
        ValueError,
        "no valid preprocessing: 'std'",
    ),
    "other weights": (
        {"config.json": SMALL, "model.safetensors": {"fc.weight": torch.ones(2)}},
        EfficientDenseNet,
        ValueError,
        r"they have dense blocks of no layers, the model of \[3, 2\]; unknown fc\.weight; missing features\.conv0",
    ),
}


@pytest.mark.parametrize(("files", "network", "error", "message"), BAD_FOLDERS.values(), ids=BAD_FOLDERS)
def test_folders_that_do_not_describe_the_network(tmp_path, files, network, error, message):
    write(tmp_path, files)
    with pytest.raises(error, match=message):
        network.from_pretrained(tmp_path)


def test_a_description_that_is_no_json(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json of .* is no JSON"):
        EfficientDenseNet.from_pretrained(tmp_path)


MISSING = {
    "huggingface_hub": lambda folder: EfficientDenseNet.from_pretrained("me/mine"),
    "huggingface_hub to save": lambda folder: small().save_pretrained(folder),
    "safetensors": lambda folder: load_weights(small(), folder / "weights.safetensors"),
    "h5py": lambda folder: load_weights(small(), folder / "weights.h5"),
    "torchvision": lambda folder: EfficientDenseNet121(weights="DEFAULT"),
    "torchvision for transforms": lambda folder: PREPROCESSING.transforms(),
    "torchvision's registry": lambda folder: importlib.import_module("densenet_efficient.torchvision"),
    "timm": lambda folder: importlib.import_module("densenet_efficient.timm"),
}


@pytest.mark.parametrize(("name", "use"), MISSING.items(), ids=MISSING)
def test_a_missing_package_is_named_with_its_remedy(monkeypatch, tmp_path, name, use):
    package = name.partition(" ")[0].removesuffix("'s")
    registry = f"densenet_efficient.{package}"
    for module in [module for module in sys.modules if module.partition(".")[0] == package or module == registry]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(sys, "meta_path", [Missing(package), *sys.meta_path])
    with pytest.raises(
        ModuleNotFoundError, match=rf"needs {package}, which is not installed: pip install 'densenet-eff.*\["
    ):
        use(tmp_path)


def test_an_installed_package_that_is_broken(monkeypatch, tmp_path):
    (tmp_path / "broken_package.py").write_text("import missing_in_a_broken_package")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match=r"^No module named 'missing_in_a_broken_package'$"):
        needed("broken_package", "train")


class Missing:
    """Finds one package missing."""

    def __init__(self, package):
        self.package = package

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == self.package:
            raise ModuleNotFoundError(f"No module named {self.package!r}", name=self.package)


@pytest.mark.parametrize("source", ["IMAGENET", [1]])
def test_load_weights_wants_a_module(source):
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module to load weights into, got a str"):
        load_weights("model", source)


def test_a_checkpoint_of_another_network():
    theirs = torchvision.models.DenseNet(4, (3, 3), 6, 3, num_classes=5)
    model = small()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"blocks of \[3, 3\] layers, the model of \[3, 2\]; unknown .*denselayer3"):
        load_weights(model, theirs.state_dict())
    assert_close(model.state_dict(), before, 0)


def test_the_package_imports_none_of_them():
    code = (
        "import sys, densenet_efficient; print(*{'h5py', 'huggingface_hub', 'safetensors', 'timm'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"


@pytest.mark.parametrize("network", [EfficientDenseNet, EfficientDenseNet121])
def test_a_checkpoint_of_fit_describes_its_network(network, tmp_path):
    original = EfficientDenseNet121(num_classes=3, in_channels=1)
    config = {"config": original.config, "class_names": ["a", "b", "c"]}
    torch.save({"densenet_efficient": config, "state_dict": original.state_dict()}, tmp_path / "best.ckpt")
    model = network.from_pretrained(tmp_path / "best.ckpt")
    assert_close(model.state_dict(), original.state_dict(), 0)
    with pytest.raises(ValueError, match=r"is no EfficientDenseNet201: it has block_config=\[6, 12, 24, 16\]"):
        EfficientDenseNet201.from_pretrained(tmp_path / "best.ckpt")
