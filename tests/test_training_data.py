"""What to train on: folders, tables, image files of all kinds, public data sets, splits, order, damaged files."""

from __future__ import annotations

import csv
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from training_cases import make_cifar, make_images, write_dicom

from densenet_efficient.cli import main
from densenet_efficient.training.data import CSVData, FolderData, ImageData
from densenet_efficient.training.datasets import CIFARData, DigitsData, MedMNISTData, SVHNData
from densenet_efficient.training.images import read_image
from densenet_efficient.training.loading import EpochSampler
from densenet_efficient.training.splits import stratified_split

SMALL: dict[str, Any] = {"image_size": 8, "batch_size": 4, "num_workers": 0}
LUMINANCE = (0.2989, 0.587, 0.114)  # torchvision's weights of red, green and blue; it cuts off the fraction


def write_table(path: Path, rows: list[dict[str, Any]]) -> Path:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


# ---- splits ----


def test_each_split_has_its_share_of_each_class() -> None:
    labels = np.eye(3)[[0] * 50 + [1] * 20 + [2] * 7]
    parts = stratified_split(labels, (0.6, 0.2, 0.2), seed=0)
    assert sorted(index for part in parts for index in part) == list(range(77))
    for part, fraction in zip(parts, (0.6, 0.2, 0.2), strict=True):
        assert np.abs(labels[part].sum(0) - fraction * labels.sum(0)).max() < 1
    assert parts == stratified_split(labels, (0.6, 0.2, 0.2), seed=0)
    assert parts != stratified_split(labels, (0.6, 0.2, 0.2), seed=1)


def test_groups_stay_whole_and_several_labels_stay_balanced() -> None:
    generator = np.random.default_rng(0)
    labels = (generator.random((400, 4)) < (0.5, 0.3, 0.1, 0.05)).astype(float)
    groups = [f"patient {number}" for number in generator.integers(0, 120, 400)]
    parts = stratified_split(labels, (0.7, 0.3), seed=0, groups=groups)
    assert not {groups[index] for index in parts[0]} & {groups[index] for index in parts[1]}
    shares = labels[parts[1]].sum(0) / labels.sum(0)
    assert np.abs(shares - 0.3).max() < 0.05


# ---- folders ----


def test_folder_is_split_by_class(tmp_path: Path) -> None:
    data = FolderData(make_images(tmp_path), **SMALL)
    assert data.task.class_names == ["bright", "dark"]
    assert sorted(data.splits.validation.labels.tolist()) == [0, 1]
    assert sorted(data.splits.train.labels.tolist()) == [0] * 5 + [1] * 5
    images, labels = next(iter(data.train_dataloader()))
    assert images.shape == (4, 3, 8, 8) and images.dtype == torch.float32 and labels.dtype == torch.int64


def test_folder_with_train_val_and_test(tmp_path: Path) -> None:
    for name, count in (("train", 3), ("val", 2), ("test", 1)):
        make_images(tmp_path / name, per_class=count)
    data = FolderData(tmp_path, **SMALL)
    assert [len(samples) for samples in data.splits.parts().values()] == [6, 4, 2]
    assert all("/val/" in path for path in data.splits.validation.sources)


def empty_class(folder: Path) -> None:
    make_images(folder)
    (folder / "empty").mkdir()


def empty_class_in_validation(folder: Path) -> None:
    make_images(folder / "train")
    make_images(folder / "val")
    for path in (folder / "val" / "dark").iterdir():
        path.unlink()


def class_missing_in_validation(folder: Path) -> None:
    make_images(folder / "train")
    make_images(folder / "val", names=("bright",))


def unknown_class_in_validation(folder: Path) -> None:
    make_images(folder / "train")
    make_images(folder / "val", names=("bright", "dark", "grey"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (empty_class, r"empty: no image in this class folder; add images of it, or remove the folder"),
        (empty_class_in_validation, r"val/dark: no image in this class folder"),
        (class_missing_in_validation, r"val: class dark of .*train is missing; add images"),
        (unknown_class_in_validation, r"val/grey: class grey is not in .*train; add it there or remove it"),
        (
            lambda folder: make_images(folder, per_class=1),
            r"^/.*: class bright, dark: no image in the validation split; it needs more",
        ),
        (lambda folder: make_images(folder, names=("one",)), "at least 2 classes"),
        (lambda folder: None, "one subfolder of images per class, found none"),
    ],
)
def test_folders_that_cannot_be_trained_on(make: Any, message: str, tmp_path: Path) -> None:
    make(tmp_path)
    with pytest.raises(ValueError, match=message):
        FolderData(tmp_path, **SMALL)


def test_folders_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none: no such folder; expected one with a subfolder of images per"):
        FolderData(tmp_path / "none", **SMALL)
    make_images(tmp_path / "train")
    with pytest.raises(FileNotFoundError, match=r"found train, but no val beside it; add one, or give .*/train itself"):
        FolderData(tmp_path, **SMALL)


@pytest.mark.parametrize(
    ("validation", "test", "message"),
    [
        (1.0, 0.0, "^validation_fraction: expected a number of at least 0 and below 1, got 1.0"),
        (0.2, -0.1, "^test_fraction: expected a number of at least 0 and below 1, got -0.1"),
        (0.6, 0.4, "^validation_fraction must be above 0 and leave images to train on, together with test_fraction"),
        (0.0, 0.4, "^validation_fraction must be above 0"),
    ],
)
def test_fractions_that_leave_a_split_empty(validation: float, test: float, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        FolderData(make_images(tmp_path), validation_fraction=validation, test_fraction=test, **SMALL)


# ---- tables ----


@pytest.fixture
def rows(tmp_path: Path) -> list[dict[str, Any]]:
    """Ten patients of two images each."""
    make_images(tmp_path, per_class=10)
    return [
        {"path": f"{name}/{index}.png", "label": name, "patient": f"{name} {index // 2}", "split": "train"}
        for name in ("bright", "dark")
        for index in range(10)
    ]


def test_table_with_patients(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    data = CSVData(write_table(tmp_path / "table.csv", rows), group_column="patient", test_fraction=0.2, **SMALL)
    groups = [set(samples.groups or ()) for samples in data.splits.parts().values()]
    assert sum(map(len, groups)) == len(set().union(*groups)) == 10
    assert [len(samples) for samples in data.splits.parts().values()] == [12, 4, 4]
    assert next(iter(data.val_dataloader()))[0].shape == (4, 3, 8, 8)


def test_table_that_names_the_splits(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    for row in rows[4:6] + rows[-2:]:
        row["split"] = "val"
    data = CSVData(write_table(tmp_path / "table.csv", rows), split_column="split", group_column="patient", **SMALL)
    assert [len(samples) for samples in data.splits.parts().values()] == [16, 4]


@pytest.mark.parametrize("layout", ["separator", "columns"])
def test_table_of_several_labels(layout: str, rows: list[dict[str, Any]], tmp_path: Path) -> None:
    for index, row in enumerate(rows):
        row["label"] = "a|b" if index % 2 else "a" if index % 3 else ""
        row |= {"a": int("a" in row["label"]), "b": int("b" in row["label"])}
    table = write_table(tmp_path / "table.csv", rows)
    how: dict[str, Any] = {"label_separator": "|"} if layout == "separator" else {"label_columns": ["a", "b"]}
    data = CSVData(table, class_weights=True, **how, **SMALL)
    assert data.task.class_names == ["a", "b"] and data.task.multi_label
    labels = data.splits.train.labels
    assert labels.shape == (len(data.splits.train), 2) and len(labels) + len(data.splits.validation) == 20
    torch.testing.assert_close(data.task.class_weights, (len(labels) - labels.sum(0)) / labels.sum(0))


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda rows: rows[3].update(label=""), {}, r"table.csv:5: column label is empty"),
        (lambda rows: rows[3].update(path=" "), {}, r"table.csv:5: column path is empty"),
        (lambda rows: None, {"label_column": "diagnosis"}, r"no column diagnosis; it has path, label, patient, split"),
        (lambda rows: rows[3].update(split="maybe"), {"split_column": "split"}, "must be train, val or test"),
        (
            lambda rows: rows[3].update(split="val", label="grey"),
            {"split_column": "split"},
            r"table.csv:5: label grey of the validation split is in no training row",
        ),
        (
            lambda rows: rows[3].update(split="val"),
            {"split_column": "split", "group_column": "patient"},
            r"group bright 1 is in the train and the validation split",
        ),
        (
            lambda rows: rows[3].update(split="val"),
            {"split_column": "split"},
            r"table.csv: class dark: no image in the valid",
        ),
        (
            lambda rows: None,
            {"split_column": "split"},
            r"table.csv: no row of the validation split; name some val, or leave the split column out",
        ),
        (lambda rows: None, {"label_columns": ["patient"]}, "column patient must be 0 or 1, got 'bright 0'"),
    ],
)
def test_tables_that_cannot_be_trained_on(
    change: Any, options: dict[str, Any], message: str, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    change(rows)
    table = write_table(tmp_path / "table.csv", rows)
    with pytest.raises(ValueError, match=message):
        CSVData(table, **options, **SMALL)


def test_a_table_without_rows(tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_text("path,label\n")
    with pytest.raises(ValueError, match=r"table.csv: no row below its header"):
        CSVData(tmp_path / "table.csv", **SMALL)


# ---- image files ----


PIXELS = np.arange(48).reshape(6, 8) * 50
HOUNSFIELD = {"RescaleSlope": 1, "RescaleIntercept": -1000}


@pytest.mark.parametrize(
    ("elements", "value_range", "expected"),
    [
        ({}, None, PIXELS / 2350),
        (HOUNSFIELD | {"WindowCenter": 40.5, "WindowWidth": 401}, None, ((PIXELS - 840) / 400).clip(0, 1)),
        (HOUNSFIELD, (-1000, 1000), (PIXELS / 2000).clip(0, 1)),
        ({"PhotometricInterpretation": "MONOCHROME1"}, None, 1 - PIXELS / 2350),
    ],
)
def test_dicom(elements: dict[str, Any], value_range: Any, expected: np.ndarray, tmp_path: Path) -> None:
    image = read_image(write_dicom(tmp_path / "slice", PIXELS, **elements), 3, value_range)
    assert image.shape == (3, 6, 8)
    np.testing.assert_allclose(image[1].numpy(), expected, atol=1e-6)


def test_dicom_in_colour(tmp_path: Path) -> None:
    pixels = np.arange(6 * 8 * 3, dtype=np.uint8).reshape(6, 8, 3)
    colours = {"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB", "PlanarConfiguration": 0}
    bits = {"BitsAllocated": 8, "BitsStored": 8, "HighBit": 7, "PixelData": pixels.tobytes()}
    path = write_dicom(tmp_path / "slice", pixels, **colours, **bits)
    np.testing.assert_array_equal(read_image(path, 3).numpy(), pixels.transpose(2, 0, 1))
    grey = read_image(path, 1)
    assert grey.shape == (1, 6, 8) and grey.dtype == torch.uint8
    np.testing.assert_allclose(grey[0].numpy(), pixels @ LUMINANCE, atol=1)


def test_dicom_of_several_frames(tmp_path: Path) -> None:
    frames = {"NumberOfFrames": 2, "PixelData": PIXELS.astype("<u2").tobytes() * 2}
    path = write_dicom(tmp_path / "slice", PIXELS, **frames)
    with pytest.raises(ValueError, match=r"slice: expected a DICOM file of one frame, got 2; export the frames"):
        read_image(path, 1)


def test_dicom_without_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_dicom(tmp_path / "slice", PIXELS)
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(ValueError, match=r"slice: DICOM needs pydicom; pip install pydicom"):
        read_image(path, 1)


def test_a_dicom_file_needs_no_name_of_its_kind(tmp_path: Path) -> None:
    for name in ("normal", "opaque"):
        (tmp_path / name).mkdir()
        for index in range(5):
            write_dicom(tmp_path / name / f"1.2.840.{index}", PIXELS)
    data = FolderData(tmp_path, **SMALL)
    data.setup("fit")
    assert sum(map(len, data.splits.parts().values())) == 10


def test_sixteen_bits_and_single_channels(tmp_path: Path) -> None:
    deep = np.array([[0, 4095], [32768, 65535]], dtype=np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    np.testing.assert_allclose(read_image(tmp_path / "deep.png", 1)[0].numpy(), deep / 65535, atol=1e-6)
    np.testing.assert_allclose(read_image(tmp_path / "deep.png", 1, (0, 4095))[0, 0].numpy(), [0, 1])
    Image.new("RGB", (4, 2), (255, 0, 0)).save(tmp_path / "red.png")
    assert read_image(tmp_path / "red.png", 1).tolist() == [[[76] * 4] * 2]  # 0.299 * 255
    assert read_image(tmp_path / "red.png", 3).shape == (3, 2, 4)
    Image.fromarray(deep.astype(np.int32)).save(tmp_path / "deeper.tif")
    with pytest.raises(ValueError, match=r"deeper.tif: an image of 32 bits .* give value_range"):
        read_image(tmp_path / "deeper.tif", 1)


def damage(folder: Path) -> list[str]:
    """An empty, a truncated and foreign files among the images of a folder; what the system left there is none."""
    whole = (folder / "dark" / "0.png").read_bytes()
    bad = {
        "empty.png": b"",
        "cut.png": whole[: len(whole) // 2],
        "text.png": b"no image",
        "cut.dcm": b"\0" * 128 + b"DICM",
        "notes.txt": b"text",
    }
    for name, content in (bad | {"Thumbs.db": b"", ".hidden": b""}).items():
        (folder / "dark" / name).write_bytes(content)
    return list(bad)


def test_bad_files_are_named_and_refused_or_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = damage(make_images(tmp_path, per_class=10))
    with pytest.raises(ValueError, match=r"5 of 25 files cannot be read .* --data.bad_files skip") as error:
        FolderData(tmp_path, **SMALL).setup("fit")
    assert all(f"dark/{name}: expected an undamaged image" in str(error.value) for name in names[:-1])
    assert "dark/notes.txt: of another type, by its name" in str(error.value)
    data = FolderData(tmp_path, bad_files="skip", **SMALL)
    data.setup("fit")
    assert sum(map(len, data.splits.parts().values())) == 20
    assert "Skipping 5 of 25 files" in capsys.readouterr().out


def test_an_image_in_no_class_folder_is_named(tmp_path: Path) -> None:
    Image.new("L", (9, 9)).save(make_images(tmp_path) / "stray.png")
    (tmp_path / "README.txt").write_text("where these are from")
    with pytest.raises(ValueError, match=r"1 of 13 files .*stray.png: in no class folder\. "):
        FolderData(tmp_path, **SMALL).setup("fit")


def test_names_of_images(tmp_path: Path) -> None:
    """All that Pillow writes under these names is read by them."""
    make_images(tmp_path)
    for suffix in ("jfif", "jpe", "jp2", "j2k", "pnm", "pbm", "webp", "gif", "bmp", "tiff"):
        Image.new("RGB", (9, 9), (200,) * 3).save(tmp_path / "bright" / f"image.{suffix}")
    data = FolderData(tmp_path, **SMALL)
    data.setup("fit")
    assert sum(map(len, data.splits.parts().values())) == 22


def test_check_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for part in ("train", "val"):
        make_images(tmp_path / part)
    damage(tmp_path / "train")
    assert main(["check-data", "--data", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "5 files cannot be read, 12 are in more than one split, 0 are repeated" in out
    assert f"Unreadable: {tmp_path}/train/dark/notes.txt" in out
    assert f"Unreadable: {tmp_path}/train/dark/empty.png" in out
    assert main(["check-data", "--data", "digits"]) == 0


# ---- order, weights, augmentation ----


def order(sampler: EpochSampler, epoch: int) -> list[int]:
    sampler.set_epoch(epoch)
    return [index for index, _ in sampler]


def test_the_order_follows_from_seed_and_epoch() -> None:
    sampler = EpochSampler(10, batch_size=2, seed=3)
    assert sorted(order(sampler, 0)) == list(range(10))
    assert order(sampler, 0) == order(EpochSampler(10, 2, 3), 0)
    assert order(sampler, 0) != order(sampler, 1)
    shares = [order(EpochSampler(11, 2, 3, rank=rank, world_size=2), 5) for rank in (0, 1)]
    assert [len(share) for share in shares] == [4, 4] and not set(shares[0]) & set(shares[1])
    with pytest.raises(ValueError, match=r"one batch of 8 images.*2 processes, got 10 images; lower --data.batch_size"):
        EpochSampler(10, 8, 0, world_size=2)


def test_rare_classes_are_weighted_or_drawn_more_often(tmp_path: Path) -> None:
    make_images(tmp_path, per_class=40)
    for index in range(10, 40):
        (tmp_path / "dark" / f"{index}.png").unlink()
    data = FolderData(tmp_path, weighted_sampling=True, **SMALL)
    drawn = Counter(
        label
        for _ in range(20)
        for _, batch in [(0, b) for b in data.train_dataloader()]
        for label in batch[1].tolist()
    )
    assert 0.8 < drawn[0] / drawn[1] < 1.25
    weights = FolderData(tmp_path, class_weights=True, **SMALL).task.class_weights
    torch.testing.assert_close(weights, torch.tensor([40 / 64, 40 / 16]))
    with pytest.raises(ValueError, match="choose one"):
        FolderData(tmp_path, class_weights=True, weighted_sampling=True, **SMALL)


@pytest.mark.parametrize("augmentation", ["none", "photograph", "medical", "small", "digits"])
def test_augmentation(augmentation: Any, tmp_path: Path) -> None:
    data = FolderData(make_images(tmp_path), augmentation=augmentation, **SMALL)
    dataset = data.train_dataloader().dataset
    torch.manual_seed(0)
    first, same = dataset[0, 1], dataset[0, 1]
    assert first[0].shape == (3, 8, 8)
    assert torch.equal(first[0], same[0])
    assert torch.initial_seed() == 0 and torch.equal(
        torch.rand(1), torch.rand(1, generator=torch.Generator().manual_seed(0))
    )


# ---- public data sets ----


def test_digits() -> None:
    data = DigitsData(batch_size=64)
    assert [len(samples) for samples in data.splits.parts().values()] == [1438, 359]
    images = torch.cat([images for images, _ in data.val_dataloader()])
    assert images.shape == (359, 1, 16, 16)
    assert abs(images.mean()) < 0.05 and 0.8 < images.std() < 1.05  # enlarging smooths a little


def test_cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_cifar(tmp_path, monkeypatch)
    data = CIFARData(root=tmp_path, download=False, batch_size=4)
    assert [len(samples) for samples in data.splits.parts().values()] == [90, 10, 20]
    assert next(iter(data.train_dataloader()))[0].shape == (4, 3, 32, 32)
    whole = CIFARData(root=tmp_path, download=False, validation_fraction=0, batch_size=4)
    assert [len(samples) for samples in whole.splits.parts().values()] == [100, 20, 20]


def test_cifar_of_100_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_cifar(tmp_path, monkeypatch, classes=100)
    data = CIFARData(classes=100, root=tmp_path, download=False, batch_size=4)
    assert len(data.task.class_names) == 100
    assert [len(samples) for samples in data.splits.parts().values()] == [200, 100, 300]


def test_svhn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from scipy.io import savemat
    from torchvision.datasets import SVHN

    monkeypatch.setattr(SVHN, "_check_integrity", lambda self: True)
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3, 30), dtype=np.uint8)
    for part in ("train", "test"):
        savemat(tmp_path / f"{part}_32x32.mat", {"X": pixels, "y": np.arange(30)[:, None] % 10 + 1})
    data = SVHNData(tmp_path, download=False, batch_size=4)
    assert [len(samples) for samples in data.splits.parts().values()] == [20, 10, 30]
    image = data.read_source(data.splits.test.sources[7])  # type: ignore[union-attr]
    np.testing.assert_array_equal(image.numpy(), pixels[..., 7].transpose(2, 0, 1))
    grey = SVHNData(tmp_path, download=False, channels=1, batch_size=4)
    image = grey.read_source(grey.splits.test.sources[7])  # type: ignore[union-attr]
    np.testing.assert_allclose(image[0].numpy(), pixels[..., 7] @ LUMINANCE, atol=1)
    assert next(iter(grey.val_dataloader()))[0].shape == (4, 1, 32, 32)


@pytest.mark.parametrize(("name", "channels", "classes"), [("pneumoniamnist", 1, 2), ("chestmnist", 1, 14)])
def test_medmnist(name: str, channels: int, classes: int, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    content = {}
    for part, count in (("train", 8), ("val", 4), ("test", 6)):
        content[f"{part}_images"] = generator.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = generator.integers(0, 2, (count, classes if classes == 14 else 1))
        content[f"{part}_labels"] = labels.astype(np.uint8)
    np.savez(tmp_path / f"{name}.npz", **content)
    data = MedMNISTData(name, root=tmp_path, download=False, channels=1, batch_size=4)
    assert [len(samples) for samples in data.splits.parts().values()] == [8, 4, 6]
    assert len(data.task.class_names) == classes and data.task.multi_label == (classes == 14)
    images, labels = next(iter(data.train_dataloader()))
    assert images.shape == (4, channels, 28, 28) and labels.shape == ((4, 14) if classes == 14 else (4,))
    with pytest.raises(ValueError, match="expected one of pathmnist"):
        MedMNISTData("mnist", root=tmp_path, download=False)


def test_medmnist_without_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "medmnist", None)
    with pytest.raises(ModuleNotFoundError, match=r"medmnist.*; pip install 'densenet-efficient\[medmnist\]'"):
        MedMNISTData("pneumoniamnist", root=tmp_path, download=False)


def test_every_data_module_is_documented() -> None:
    for kind in (ImageData, FolderData, CSVData, DigitsData, CIFARData, SVHNData, MedMNISTData):
        assert kind.__doc__ and "Args:" in kind.__doc__
