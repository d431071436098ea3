"""What to train on: folders, tables, public data sets, splits, order, weights."""

from __future__ import annotations

import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training_cases import LUMINANCE, make_cifar, make_images, make_patients, write_table

from densenet_efficient.training.data import CSVData, FolderData, ImageData
from densenet_efficient.training.datasets import CIFARData, DigitsData, MedMNISTData, SVHNData
from densenet_efficient.training.folders import list_files
from densenet_efficient.training.loading import EpochSampler

SMALL: dict[str, Any] = {"image_size": 8, "batch_size": 4, "num_workers": 0}


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


@pytest.mark.parametrize("names", [("Train", "VAL", "Test"), ("training", "valid", "Testing")])
def test_other_names_of_the_splits(names: tuple[str, ...], tmp_path: Path) -> None:
    for count, name in enumerate(names, start=1):
        make_images(tmp_path / name, per_class=count)
    data = FolderData(tmp_path, **SMALL)
    assert data.task.class_names == ["bright", "dark"]
    assert [len(samples) for samples in data.splits.parts().values()] == [2, 4, 6]


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


def class_in_latin1(folder: Path) -> None:
    make_images(folder, names=("bright", os.fsdecode(b"d\xfcster")))


def two_folders_of_one_split(folder: Path) -> None:
    for name in ("train", "Val", "validation"):
        make_images(folder / name)


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
        (class_in_latin1, r"^/.*: class folder b'd\\xfcster': not a name in UTF-8; rename it$"),
        (
            two_folders_of_one_split,
            r"Val and validation both name the validation split; put their images into one",
        ),
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


def test_splits_without_one_to_train_on(tmp_path: Path) -> None:
    for name in ("trainset", "val", "test", ".hidden"):
        make_images(tmp_path / name)
    message = (
        r"^/.*: found test, trainset, val, but no train beside them; expected train, val and, .* test, each with a "
        r"subfolder of images per class; rename the one to train on, or give a single one itself$"
    )
    with pytest.raises(FileNotFoundError, match=message):
        FolderData(tmp_path, **SMALL)


def test_hidden_folders_are_left_out_and_linked_ones_are_not(tmp_path: Path) -> None:
    folder = make_images(tmp_path / "images")
    for name in (".ipynb_checkpoints", "visit/.cache"):
        make_images(folder / "dark" / name, names=("copies",))
    make_images(tmp_path, names=("elsewhere",), per_class=2)
    (folder / "dark" / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "dark" / "linked again").symlink_to(tmp_path / "elsewhere")
    (folder / "dark" / "visit" / "cycle").symlink_to(folder / "dark")
    images, others = list_files(folder / "dark")
    names = [str(path.relative_to(folder / "dark")) for path in images]
    assert names == [*(f"{index}.png" for index in range(6)), "linked/0.png", "linked/1.png"] and not others
    assert sum(map(len, FolderData(folder, **SMALL).splits.parts().values())) == 6 + 8


@pytest.mark.parametrize(
    ("validation", "test", "message"),
    [
        (1.0, 0.0, "^validation_fraction: expected a number of at least 0 and below 1, got 1.0"),
        (0.2, -0.1, "^test_fraction: expected a number of at least 0 and below 1, or 1 to test with all, got -0.1"),
        (
            0.6,
            0.4,
            "^--data.validation_fraction must be above 0 and, together with --data.test_fraction, below 1, "
            "so that images are left to train on; got 0.6 and 0.4$",
        ),
        (0.0, 0.4, "^--data.validation_fraction must be above 0 and, "),
        (0.0, 1.2, "^test_fraction: expected a number of at least 0 and below 1, or 1 to test with all, got 1.2"),
    ],
)
def test_fractions_that_leave_a_split_empty(validation: float, test: float, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        FolderData(make_images(tmp_path), validation_fraction=validation, test_fraction=test, **SMALL)


# ---- tables ----


@pytest.fixture
def rows(tmp_path: Path) -> list[dict[str, Any]]:
    return make_patients(tmp_path)


def test_table_with_patients(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    data = CSVData(write_table(tmp_path / "table.csv", rows), group_column="patient", test_fraction=0.2, **SMALL)
    groups = [set(samples.groups or ()) for samples in data.splits.parts().values()]
    assert sum(map(len, groups)) == len(set().union(*groups)) == 10
    assert [len(samples) for samples in data.splits.parts().values()] == [12, 4, 4]
    assert next(iter(data.val_dataloader()))[0].shape == (4, 3, 8, 8)


def test_table_that_names_the_splits(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    for row in rows[4:6] + rows[-2:]:
        row["split"] = " Val "
    data = CSVData(write_table(tmp_path / "table.csv", rows), split_column="split", group_column="patient", **SMALL)
    assert [len(samples) for samples in data.splits.parts().values()] == [16, 4]


def test_one_finding_is_a_table_of_two_classes(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    for index, row in enumerate(rows):
        row["pneumonia"] = index % 2
    data = CSVData(write_table(tmp_path / "table.csv", rows), label_column="pneumonia", **SMALL)
    assert data.task.class_names == ["0", "1"] and not data.task.multi_label


@pytest.mark.parametrize("layout", ["separator", "columns"])
def test_table_of_several_labels(layout: str, rows: list[dict[str, Any]], tmp_path: Path) -> None:
    for index, row in enumerate(rows):
        row["label"] = "a|b" if index % 2 else "a" if index % 3 else ""
        row |= {"a": int("a" in row["label"]), "b": float("b" in row["label"])}
    table = write_table(tmp_path / "table.csv", rows)
    how: dict[str, Any] = {"label_separator": "|"} if layout == "separator" else {"label_columns": ["a", "b"]}
    data = CSVData(table, class_weights=True, **how, **SMALL)
    assert data.task.class_names == ["a", "b"] and data.task.multi_label
    labels = data.splits.train.labels
    assert labels.shape == (len(data.splits.train), 2) and len(labels) + len(data.splits.validation) == 20
    torch.testing.assert_close(data.task.class_weights, (len(labels) - labels.sum(0)) / labels.sum(0))
    assert not labels.any(1).all() and (data._sampling_weights() > 0).all()  # an image of nothing is drawn too


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
        (
            lambda rows: None,
            {"label_column": "diagnosis", "group_column": "name"},
            r"no column diagnosis, name; it has .*; name another with --data.label_column, --data.group_column$",
        ),
        (
            lambda rows: None,
            {"label_columns": ["patient"], "label_separator": "|"},
            "both tell of several .* choose one",
        ),
        (lambda rows: None, {"label_columns": ["patient"]}, "column patient must be 0 or 1, got 'bright 0'"),
        (
            lambda rows: [row.update(patient=index % 2) for index, row in enumerate(rows)],
            {"label_columns": ["patient"]},
            r"^/.*table.csv: expected at least 2 classes, found only patient; "
            r"name it with --data.label_column patient instead of label_columns: then 0 and 1 are the classes$",
        ),
        (
            lambda rows: [row.update(label="same") for row in rows],
            {},
            r"^/.*table.csv: expected at least 2 classes, found only same$",
        ),
        (
            lambda rows: [row.update(label="" if index % 2 else "same") for index, row in enumerate(rows)],
            {"label_separator": "|"},
            r"expected at least 2 classes, found only same; to tell images with it from those without, name the two",
        ),
        (
            lambda rows: [row.update(label="") for row in rows],
            {"label_separator": "|"},
            r"^/.*table.csv: expected at least 2 classes, found only none",
        ),
        (
            lambda rows: rows[3].update(patient=" bright 1 ", split="val"),
            {"split_column": "split", "group_column": "patient"},
            r"group bright 1 is in the train and the validation split",
        ),
    ],
)
def test_tables_that_cannot_be_trained_on(
    change: Any, options: dict[str, Any], message: str, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    change(rows)
    table = write_table(tmp_path / "table.csv", rows)
    with pytest.raises(ValueError, match=message):
        CSVData(table, **options, **SMALL)


def test_a_table_of_files_that_are_elsewhere(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    """The remedy that is named works."""
    (tmp_path / "lists").mkdir()
    table = write_table(tmp_path / "lists" / "table.csv", rows)
    message = (
        rf"^{table}: none of the 20 files that are listed is there, such as {table.parent}/bright/0.png; "
        "say with --data.root what the paths are relative to$"
    )
    with pytest.raises(FileNotFoundError, match=message):
        CSVData(table, **SMALL)
    assert len(CSVData(table, root=tmp_path, **SMALL).splits.train) == 16


def test_spaces_around_the_names_of_columns(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    lines = [f"{row['path']}, {row['label']}" for row in rows]
    (tmp_path / "table.csv").write_text("\n".join(["path, label", *lines]))
    data = CSVData(tmp_path / "table.csv", **SMALL)
    assert data.task.class_names == ["bright", "dark"] and len(data.splits.train) == 16


def test_a_table_without_rows(tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_text("path,label\n")
    with pytest.raises(ValueError, match=r"table.csv: no row below its header"):
        CSVData(tmp_path / "table.csv", **SMALL)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"table.csv: its first line is empty; expected a header with path, label$"),
        (
            "path,label\n0.png,größer\n".encode("latin-1"),
            r"table.csv: expected a table in UTF-8, got b'\\xf6'; save it as UTF-8$",
        ),
        (
            b"path;label\n0.png;dark\n",
            r"table.csv: no column path, label; it has path;label; save it with commas .* in place of ';'$",
        ),
        (b"path\tlabel\n0.png\tdark\n", r"table.csv: no column .* in place of '\\t'$"),
        (
            b"path,label\n\n0.png,dark\n1.png\n",
            r"table.csv:4: expected 2 cells, as in the header, got 1; complete or remove the row",
        ),
        (b"path,label\n0,5.png,dark\n", r"table.csv:2: expected 2 cells, .*got 3; .* quote a cell that holds a comma$"),
        (b"path,label,label\n", "table.csv: expected each column once, got label again; rename all but one$"),
        (
            b"path,label\n" + b"0" * 200_000,
            r"table.csv: expected a table of cells with commas between them \(field larger than",
        ),
    ],
    ids=["empty", "Latin-1", "semicolons", "tabs", "short row", "long row", "repeated column", "no table"],
)
def test_files_that_are_no_tables(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        CSVData(tmp_path / "table.csv", **SMALL)


def test_a_file_that_a_table_lists_twice_stays_in_one_split(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    for seed in range(5):
        data = CSVData(write_table(tmp_path / "table.csv", rows + rows), seed=seed, **SMALL)
        assert len(data.splits.train) + len(data.splits.validation) == 40
        assert not set(data.splits.train.sources) & set(data.splits.validation.sources)


# ---- order, weights, augmentation ----


def order(sampler: EpochSampler, epoch: int) -> list[int]:
    sampler.set_epoch(epoch)
    return [index for index, _ in sampler]


def test_the_order_follows_from_seed_and_epoch() -> None:
    sampler = EpochSampler(10, batch_size=2, seed=3)
    assert sorted(order(sampler, 0)) == list(range(10))
    assert order(sampler, 0) == order(EpochSampler(10, 2, 3), 0)
    assert order(sampler, 0) != order(sampler, 1)
    assert order(EpochSampler(10, 2, 0), 1) != order(EpochSampler(10, 2, 1), 0)
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
    with pytest.raises(TypeError, match="validation_fraction"):  # it brings validation images
        MedMNISTData(name, root=tmp_path, download=False, validation_fraction=0.5)


@pytest.mark.parametrize(
    ("kind", "name", "options"),
    [(CIFARData, "CIFAR10", {}), (SVHNData, "SVHN", {}), (MedMNISTData, "MedMNIST's pathmnist", {"name": "pathmnist"})],
)
def test_a_public_data_set_that_is_not_to_be_had(
    kind: Any, name: str, options: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither in the folder, nor over a network."""

    def unreachable(*_: Any, **__: Any) -> None:
        raise OSError("no\nnetwork")

    where = rf"^{name}: not to be had in --data.root {tmp_path} "
    with pytest.raises(RuntimeError, match=rf"{where}\(Dataset not found.*\); --data.download true fetches it$"):
        kind(root=tmp_path, download=False, **options)
    monkeypatch.setattr("urllib.request.urlopen", unreachable)
    with pytest.raises(RuntimeError, match=rf"{where}\(.*\); put its files there, or try again with a network$"):
        kind(root=tmp_path, **options)


def test_medmnist_that_is_damaged(tmp_path: Path) -> None:
    (tmp_path / "pathmnist.npz").write_bytes(b"PK\3\4 cut short")
    with pytest.raises(RuntimeError, match=r"^MedMNIST's pathmnist: not to be had in .* \(File is not a zip file\); "):
        MedMNISTData("pathmnist", root=tmp_path, download=False)


def test_medmnist_without_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "medmnist", None)
    with pytest.raises(ModuleNotFoundError, match=r"medmnist.*; pip install 'densenet-efficient\[medmnist\]'"):
        MedMNISTData("pneumoniamnist", root=tmp_path, download=False)


def test_every_data_module_is_documented() -> None:
    for kind in (ImageData, FolderData, CSVData, DigitsData, CIFARData, SVHNData, MedMNISTData):
        assert kind.__doc__ and "Args:" in kind.__doc__
