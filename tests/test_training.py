"""The parts of the main job: images, the loop, checkpoints, predictions, pictures."""

from __future__ import annotations

import os
import pickle
import signal
from pathlib import Path

import pytest
import torch
from PIL import Image

from densenet_efficient.models import EfficientDenseNet
from densenet_efficient.training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from densenet_efficient.training.data import (
    DIGITS,
    ImageData,
    load_digits,
    load_folder,
    photographs,
    read_image,
)
from densenet_efficient.training.files import atomic_write
from densenet_efficient.training.loop import DeferredInterrupt, fit
from densenet_efficient.training.predict import classify
from densenet_efficient.visualize import draw_memory


def small_model(in_channels: int = 3, num_classes: int = 2) -> EfficientDenseNet:
    return EfficientDenseNet(4, (1, 1), 8, num_classes=num_classes, in_channels=in_channels, small_inputs=True)


def make_images(folder: Path, per_class: int = 6) -> Path:
    """Bright and dark 12x10 images, one subfolder each, each image of its own brightness."""
    for name, brightness in (("bright", 200), ("dark", 20)):
        (folder / name).mkdir(parents=True)
        for index in range(per_class):
            Image.new("RGB", (12, 10), (brightness + index,) * 3).save(folder / name / f"{index}.png")
    return folder


def train_briefly(data: ImageData, learning_rate: float = 0.01) -> EfficientDenseNet:
    torch.manual_seed(0)
    model = small_model()
    fit(
        model,
        data,
        epochs=2,
        batch_size=4,
        learning_rate=learning_rate,
        seed=0,
        after_step=lambda: None,
        after_epoch=lambda record: None,
    )
    return model


@pytest.fixture
def checkpoint_path(tmp_path: Path) -> Path:
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, Checkpoint(small_model(), ["bright", "dark"], photographs(8)))
    return path


def test_digits_hold_out_a_fifth_of_each_class_without_overlap() -> None:
    data = load_digits(seed=0)
    assert len(data.train) + len(data.held_out) == 1797
    assert not {id(image) for image in data.train.sources} & {id(image) for image in data.held_out.sources}
    for label in range(10):
        train, held_out = data.train.labels.count(label), data.held_out.labels.count(label)
        assert held_out == round((train + held_out) / 5)
    assert data.train[0][0].shape == data.held_out[0][0].shape == (1, 16, 16)


def test_digits_are_normalised() -> None:
    data = load_digits(seed=0)
    pixels = torch.stack([data.held_out[index][0] for index in range(len(data.held_out))])
    assert abs(pixels.mean()) < 0.05
    assert 0.8 < pixels.std() < 1.05  # enlarging smooths a little


def test_the_seed_draws_the_held_out_images() -> None:
    labels = [load_digits(seed).held_out.labels for seed in (0, 0)]
    assert labels[0] == labels[1]
    first, again, other = ([image.tobytes() for image in load_digits(s).held_out.sources] for s in (0, 0, 1))
    assert first == again
    assert first != other


def test_folder_is_split_by_class(tmp_path: Path) -> None:
    data = load_folder(make_images(tmp_path), image_size=8, seed=0)
    assert data.class_names == ["bright", "dark"]
    assert sorted(data.held_out.labels) == [0, 1]
    assert sorted(data.train.labels) == [0] * 5 + [1] * 5
    assert data.train[0][0].shape == (3, 8, 8)


def test_folder_with_train_and_val(tmp_path: Path) -> None:
    make_images(tmp_path / "train", per_class=3)
    make_images(tmp_path / "val", per_class=2)
    data = load_folder(tmp_path, image_size=8, seed=0)
    assert (len(data.train), len(data.held_out)) == (6, 4)
    assert all("val" in path for path in data.held_out.sources)


def test_train_and_val_of_other_classes_are_refused(tmp_path: Path) -> None:
    make_images(tmp_path / "train")
    make_images(tmp_path / "val")
    (tmp_path / "val" / "dark").rename(tmp_path / "val" / "grey")
    with pytest.raises(ValueError, match=r"same classes.*dark, grey"):
        load_folder(tmp_path, image_size=8, seed=0)


def test_training_repeats_exactly(tmp_path: Path) -> None:
    data = load_folder(make_images(tmp_path), image_size=8, seed=0)
    first, second = train_briefly(data).state_dict(), train_briefly(data).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_loss_of_nan_stops_the_training(tmp_path: Path) -> None:
    data = load_folder(make_images(tmp_path), image_size=8, seed=0)
    data.train.read = lambda path: Image.new("RGB", (8, 8))
    data.train.transform = lambda image: torch.full((3, 8, 8), torch.nan)
    with pytest.raises(FloatingPointError, match="became nan; lower --learning-rate"):
        train_briefly(data)


def test_too_few_images_for_a_batch(tmp_path: Path) -> None:
    data = load_folder(make_images(tmp_path, per_class=2), image_size=8, seed=0)
    with pytest.raises(ValueError, match=r"one batch of 4 images.*got 2"):
        train_briefly(data)


def test_an_interrupt_waits_for_the_check() -> None:
    with DeferredInterrupt() as interrupt:
        interrupt.check()
        signal.raise_signal(signal.SIGINT)  # of os.kill the handler may run later, then it ends whatever test is next
        with pytest.raises(KeyboardInterrupt):
            interrupt.check()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_checkpoint_gives_the_same_model_back(tmp_path: Path) -> None:
    model = small_model(in_channels=1).eval()
    save_checkpoint(tmp_path / "checkpoint.pt", Checkpoint(model, ["a", "b"], DIGITS))
    loaded = load_checkpoint(tmp_path / "checkpoint.pt")
    images = torch.randn(2, 1, 16, 16)
    assert torch.equal(loaded.model.eval()(images), model(images))
    assert loaded.model.config == model.config
    assert (loaded.class_names, loaded.preprocessing) == (["a", "b"], DIGITS)


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.99])
def test_truncated_checkpoint(checkpoint_path: Path, kept: float) -> None:
    content = checkpoint_path.read_bytes()
    checkpoint_path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(RuntimeError, match="truncated"):
        load_checkpoint(checkpoint_path)


def test_checkpoint_damaged_inside(checkpoint_path: Path) -> None:
    content = checkpoint_path.read_bytes()
    checkpoint_path.write_bytes(content.replace(b"state_dict", b"\xff" * 10))
    with pytest.raises((RuntimeError, pickle.UnpicklingError), match="written by densenet-efficient train"):
        load_checkpoint(checkpoint_path)


def test_malicious_pickle_is_refused_and_not_run(tmp_path: Path) -> None:
    class Malicious:
        def __reduce__(self) -> tuple[object, ...]:
            return os.mkdir, (str(tmp_path / "was_here"),)

    torch.save({"state_dict": Malicious()}, tmp_path / "archive.pt")
    (tmp_path / "bare.pt").write_bytes(pickle.dumps(Malicious()))
    with pytest.raises(pickle.UnpicklingError, match="more than tensors and plain values"):
        load_checkpoint(tmp_path / "archive.pt")
    with pytest.raises(RuntimeError, match="not a checkpoint at all"):
        load_checkpoint(tmp_path / "bare.pt")
    assert not (tmp_path / "was_here").exists()


def test_checkpoint_of_another_program(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2).state_dict(), tmp_path / "linear.pt")
    with pytest.raises(RuntimeError, match="not a checkpoint of densenet-efficient"):
        load_checkpoint(tmp_path / "linear.pt")


def test_checkpoint_of_another_architecture(checkpoint_path: Path) -> None:
    content = torch.load(checkpoint_path, weights_only=True)
    content["config"]["growth_rate"] = 5
    torch.save(content, checkpoint_path)
    with pytest.raises(RuntimeError, match="another architecture"):
        load_checkpoint(checkpoint_path)


@pytest.mark.parametrize("entry", ["config", "state_dict", "class_names", "preprocessing"])
def test_checkpoint_without_an_entry(checkpoint_path: Path, entry: str) -> None:
    content = torch.load(checkpoint_path, weights_only=True)
    del content[entry]
    torch.save(content, checkpoint_path)
    with pytest.raises(RuntimeError, match=entry):
        load_checkpoint(checkpoint_path)


def test_a_failed_write_leaves_the_earlier_file_alone(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"earlier")
    with pytest.raises(TypeError), atomic_write(tmp_path / "file") as file:
        file.write("text, where bytes are expected")  # type: ignore[arg-type]
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"earlier"


def test_predictions_are_the_models_own(checkpoint_path: Path, tmp_path: Path) -> None:
    Image.new("RGB", (20, 9), "white").save(tmp_path / "white.jpg")
    checkpoint = load_checkpoint(checkpoint_path)
    [(path, ranking)] = classify(checkpoint, [tmp_path / "white.jpg"])
    image = checkpoint.preprocessing.transform()(Image.open(path))
    expected = checkpoint.model.eval()(image[None]).softmax(1)[0]
    assert dict(ranking) == pytest.approx({"bright": expected[0].item(), "dark": expected[1].item()})
    assert ranking[0][1] >= ranking[1][1]


def test_images_of_16_bits_are_refused(tmp_path: Path) -> None:
    Image.new("I;16", (8, 8)).save(tmp_path / "deep.png")
    with pytest.raises(ValueError, match="8 bits per channel, got PIL mode I;16"):
        read_image(tmp_path / "deep.png", "L")


def test_the_memory_picture_is_a_png(tmp_path: Path) -> None:
    draw_memory(
        {22: {"naive": 4.0, "efficient": 1.0}, 40: {"naive": 9.0, "efficient": 1.5}},
        "none",
        tmp_path / "a.png",
    )
    with Image.open(tmp_path / "a.png") as image:
        assert image.format == "PNG"
        assert min(image.size) > 400
