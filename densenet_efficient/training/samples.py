"""Labelled samples on disk: folders with one subfolder a class, and CSV tables of paths and labels."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from densenet_efficient.training.images import is_image
from densenet_efficient.training.splits import stratified_split

SYSTEM_FILES = {"Thumbs.db", "desktop.ini"}  # which file managers leave in folders of images
OTHER_TYPE = "of another type, by its name"
SPLIT_NAMES = {"train": "train", "val": "validation", "valid": "validation", "validation": "validation", "test": "test"}


@dataclass(frozen=True)
class Samples:
    """Where N images come from, and their labels."""

    sources: Sequence[Any] | NDArray[Any]  # paths, or images as arrays
    labels: Tensor  # int64 [N], or float32 [N, classes] of zeros and ones
    groups: Sequence[str] | None = None  # of samples that no split may separate

    def __len__(self) -> int:
        return len(self.sources)

    def subset(self, indices: Sequence[int]) -> Samples:
        return Samples(
            [self.sources[index] for index in indices],
            self.labels[list(indices)],
            None if self.groups is None else [self.groups[index] for index in indices],
        )

    def indicators(self, num_classes: int) -> Tensor:
        """The labels as float32 [N, classes] of zeros and ones."""
        if self.labels.dim() == 2:
            return self.labels
        return torch.nn.functional.one_hot(self.labels, num_classes).float()


@dataclass(frozen=True)
class Splits:
    """What to train on, to validate by and, if there is such, to test with."""

    class_names: list[str]
    train: Samples
    validation: Samples
    test: Samples | None = None
    strays: Mapping[str, str] = field(default_factory=dict, kw_only=True)  # why other files are left out, by path

    def map(self, function: Callable[[Samples], Samples]) -> Splits:
        test = None if self.test is None else function(self.test)
        return replace(self, train=function(self.train), validation=function(self.validation), test=test)

    def parts(self) -> dict[str, Samples]:
        parts = {"train": self.train, "validation": self.validation}
        return parts if self.test is None else parts | {"test": self.test}


def split(
    class_names: list[str],
    samples: Samples,
    validation_fraction: float,
    test_fraction: float,
    seed: int,
    where: object = "--data",
) -> Splits:
    """Divide the samples, which are `where`, so that each split has its share of each class, and groups stay whole.

    Raises ValueError if a class would be missing in the training or the validation images.
    """
    for name, fraction in (("validation_fraction", validation_fraction), ("test_fraction", test_fraction)):
        if not 0 <= fraction < 1:
            raise ValueError(f"{name}: expected a number of at least 0 and below 1, got {fraction}")
    if not 0 < validation_fraction + test_fraction < 1 or validation_fraction == 0:
        raise ValueError(
            "validation_fraction must be above 0 and leave images to train on, together with test_fraction"
        )
    fractions = [1 - validation_fraction - test_fraction, validation_fraction, test_fraction]
    labels = samples.indicators(len(class_names)).double().numpy()
    train, validation, test = (
        samples.subset(part) for part in stratified_split(labels, fractions, seed, samples.groups)
    )
    splits = Splits(class_names, train, validation, test if test_fraction else None)
    require_every_class(splits, where, "more images (or patients) of it, or another validation_fraction")
    return splits


def require_every_class(splits: Splits, where: object, remedy: str) -> None:
    """Raise ValueError if a class has no image in one of the splits."""
    for part, samples in splits.parts().items():
        counts = samples.indicators(len(splits.class_names)).sum(0)
        missing = [name for name, count in zip(splits.class_names, counts, strict=True) if count == 0]
        if missing:
            raise ValueError(f"{where}: class {', '.join(missing)}: no image in the {part} split; it needs {remedy}")


# ---- folders ----


def read_folder(folder: Path, validation_fraction: float, test_fraction: float, seed: int) -> Splits:
    """One subfolder of images per class, either directly in `folder` or in its subfolders train, val and test.

    Raises FileNotFoundError if there is no such folder, ValueError for a class without images or one that is missing
    in val or test.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; expected one with a subfolder of images per class")
    has_splits = (folder / "train").is_dir()
    names, train, strays = _list_classes(folder / "train" if has_splits else folder)
    if len(names) < 2:
        raise ValueError(f"{folder}: expected at least 2 classes, found only {names[0]}")
    if not has_splits:
        return replace(split(names, train, validation_fraction, test_fraction, seed, folder), strays=strays)
    parts = {}
    for path in sorted(folder.iterdir()):
        part = SPLIT_NAMES.get(path.name.lower())
        if path.is_dir() and part in ("validation", "test"):
            other_names, parts[part], others = _list_classes(path)
            strays |= others
            _require_same_classes(folder / "train", names, path, other_names)
    if "validation" not in parts:
        raise FileNotFoundError(
            f"{folder}: found train, but no val beside it; add one, or give {folder / 'train'} itself"
        )
    return Splits(names, train, **parts, strays=strays)


def _require_same_classes(train: Path, names: list[str], other: Path, other_names: list[str]) -> None:
    if unknown := sorted(set(other_names) - set(names)):
        raise ValueError(
            f"{other / unknown[0]}: class {', '.join(unknown)} is not in {train}; add it there or remove it"
        )
    if missing := sorted(set(names) - set(other_names)):
        raise ValueError(f"{other}: class {', '.join(missing)} of {train} is missing; add images of it")


def _list_classes(folder: Path) -> tuple[list[str], Samples, dict[str, str]]:
    """Class names in alphabetical order, the images of each class in order of their paths, and why others are none."""
    classes = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not classes:
        raise ValueError(f"{folder}: expected one subfolder of images per class, found none")
    paths: list[str] = []
    labels: list[int] = []
    strays = {str(path): f"{path}: in no class folder" for path in sorted(folder.iterdir()) if _is_stray_image(path)}
    for label, directory in enumerate(classes):
        images, others = list_files(directory)
        if not images:
            raise ValueError(f"{directory}: no image in this class folder; add images of it, or remove the folder")
        paths += map(str, images)
        labels += [label] * len(images)
        strays |= {str(path): f"{path}: {OTHER_TYPE}" for path in others}
    return [path.name for path in classes], Samples(paths, torch.tensor(labels)), strays


def _is_stray_image(path: Path) -> bool:
    """Whether a file beside the class folders is an image. (Beside them there may well be other files.)"""
    return path.is_file() and not _is_hidden(path) and is_image(path)


def _is_hidden(path: Path) -> bool:
    return path.name.startswith(".") or path.name in SYSTEM_FILES


def list_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """The images below `folder`, and the other files, in order. Hidden ones and the system's own are left out."""
    images: list[Path] = []
    others: list[Path] = []
    for path in sorted(folder.rglob("*")):
        if not _is_hidden(path) and path.is_file():
            (images if is_image(path) else others).append(path)
    return images, others


# ---- tables ----


@dataclass(frozen=True)
class Columns:
    """Which columns of a CSV table say what."""

    path: str = "path"
    label: str = "label"  # one class, or several with a separator between them
    indicators: Sequence[str] = ()  # or: one column of zeros and ones per class
    separator: str | None = None
    group: str | None = None
    split: str | None = None

    @property
    def used(self) -> list[str]:
        label = list(self.indicators) or [self.label]
        return [name for name in (self.path, *label, self.group, self.split) if name]

    @property
    def multi_label(self) -> bool:
        return bool(self.indicators) or self.separator is not None


def read_table(
    table: Path, root: Path, columns: Columns, validation_fraction: float, test_fraction: float, seed: int
) -> Splits:
    """A CSV table with a header: paths relative to `root`, labels, and if wanted groups and splits.

    Raises OSError if the table cannot be read, and ValueError for a column that it lacks, an empty cell, or a label
    that no training image has.
    """
    rows = read_rows(table, columns.used)
    row_classes = [_classes_of(table, number, row, columns) for number, row in enumerate(rows, start=2)]
    parts = [_part_of(table, number, row, columns) for number, row in enumerate(rows, start=2)]
    training = {name for classes, part in zip(row_classes, parts, strict=True) if part == "train" for name in classes}
    names = list(columns.indicators) or sorted(training)
    for number, (classes, part) in enumerate(zip(row_classes, parts, strict=True), start=2):
        if unknown := [name for name in classes if name not in training]:
            raise ValueError(
                f"{table}:{number}: label {', '.join(unknown)} of the {part} split is in no training row; "
                "correct it, or add training images of it"
            )
    samples = Samples(
        [str(root / row[columns.path]) for row in rows],
        _labels(row_classes, names, columns.multi_label),
        [row[columns.group] for row in rows] if columns.group else None,
    )
    if columns.split is None:
        return split(names, samples, validation_fraction, test_fraction, seed, table)
    return _as_told(table, names, samples, parts)


def read_rows(table: Path, needed: Sequence[str]) -> list[dict[str, str]]:
    """The rows of a CSV table. Raises ValueError for a missing column or an empty table."""
    with open(table, newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    header = list(reader.fieldnames or [])
    if missing := [name for name in needed if name not in header]:
        raise ValueError(f"{table}: no column {', '.join(missing)}; it has {', '.join(header) or 'no header'}")
    if not rows:
        raise ValueError(f"{table}: no row below its header")
    return rows


def _classes_of(table: Path, number: int, row: dict[str, str], columns: Columns) -> list[str]:
    for name in (columns.path, columns.group):
        if name and not (row[name] or "").strip():
            raise ValueError(f"{table}:{number}: column {name} is empty")
    if columns.indicators:
        cells = {name: (row[name] or "").strip() for name in columns.indicators}
        for name, cell in cells.items():
            if cell not in ("0", "1", "0.0", "1.0"):
                raise ValueError(f"{table}:{number}: column {name} must be 0 or 1, got {cell!r}")
        return [name for name, cell in cells.items() if float(cell)]
    cell = (row[columns.label] or "").strip()
    if columns.separator is not None:
        return sorted({name.strip() for name in cell.split(columns.separator)} - {""})
    if not cell:
        raise ValueError(f"{table}:{number}: column {columns.label} is empty")
    return [cell]


def _part_of(table: Path, number: int, row: dict[str, str], columns: Columns) -> str:
    if columns.split is None:
        return "train"  # until the split
    cell = (row[columns.split] or "").strip().lower()
    if cell not in SPLIT_NAMES:
        raise ValueError(f"{table}:{number}: column {columns.split} must be train, val or test, got {cell!r}")
    return SPLIT_NAMES[cell]


def _labels(row_classes: list[list[str]], names: list[str], multi_label: bool) -> Tensor:
    index = {name: position for position, name in enumerate(names)}
    if not multi_label:
        return torch.tensor([index[classes[0]] for classes in row_classes])
    labels = torch.zeros(len(row_classes), len(names))
    for row, classes in enumerate(row_classes):
        labels[row, [index[name] for name in classes]] = 1
    return labels


def _as_told(table: Path, names: list[str], samples: Samples, parts: list[str]) -> Splits:
    """The splits that a column names, checked: no group falls in two of them, no class is missing."""
    if samples.groups is not None:
        seen: dict[str, str] = {}
        for group, part in zip(samples.groups, parts, strict=True):
            if seen.setdefault(group, part) != part:
                raise ValueError(f"{table}: group {group} is in the {seen[group]} and the {part} split; keep it in one")
    chosen = {
        part: samples.subset([index for index, other in enumerate(parts) if other == part])
        for part in ("train", "validation", "test")
        if part in parts
    }
    if "validation" not in chosen:
        raise ValueError(f"{table}: no row of the validation split; name some val, or leave the split column out")
    splits = Splits(names, chosen["train"], chosen["validation"], chosen.get("test"))
    require_every_class(splits, table, "rows of that split")
    return splits
