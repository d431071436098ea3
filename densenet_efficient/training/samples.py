"""Labelled samples on disk: folders with one subfolder a class, and CSV tables of paths and labels."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from densenet_efficient.training.images import is_image
from densenet_efficient.training.splits import stratified_split

SYSTEM_FILES = {"Thumbs.db", "desktop.ini"}  # which file managers leave in folders of images
MAX_FOLDERS_NAMED = 10  # by a note
OTHER_TYPE = "of another type, by its name"
SPLIT_NAMES = (
    dict.fromkeys(("train", "training"), "train")
    | dict.fromkeys(("val", "valid", "validation"), "validation")
    | dict.fromkeys(("test", "testing"), "test")
)


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
    notes: Sequence[str] = field(default=(), kw_only=True)  # what to say of the data, which is no error

    def map(self, function: Callable[[Samples], Samples]) -> Splits:
        test = None if self.test is None else function(self.test)
        return replace(self, train=function(self.train), validation=function(self.validation), test=test)

    @property
    def only_test(self) -> bool:
        """Whether there is nothing but images to test with, such as another hospital's."""
        return self.test is not None and not len(self.train) and not len(self.validation)

    def parts(self) -> dict[str, Samples]:
        if self.test is not None and self.only_test:
            return {"test": self.test}
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

    A `test_fraction` of 1 makes test images of all, whatever the other fraction. Raises ValueError if a class would be
    missing in the training or the validation images.
    """
    if test_fraction == 1:
        return _only_to_test(class_names, samples)
    or_all = {"validation_fraction": "", "test_fraction": ", or 1 to test with all"}
    for (name, other), fraction in zip(or_all.items(), (validation_fraction, test_fraction), strict=True):
        if not 0 <= fraction < 1:
            raise ValueError(f"{name}: expected a number of at least 0 and below 1{other}, got {fraction}")
    if not 0 < validation_fraction + test_fraction < 1 or validation_fraction == 0:
        raise ValueError(
            "--data.validation_fraction must be above 0 and, together with --data.test_fraction, below 1, so that "
            f"images are left to train on; got {validation_fraction} and {test_fraction}"
        )
    fractions = [1 - validation_fraction - test_fraction, validation_fraction, test_fraction]
    labels = samples.indicators(len(class_names)).double().numpy()
    train, validation, test = (
        samples.subset(part) for part in stratified_split(labels, fractions, seed, samples.groups)
    )
    splits = Splits(class_names, train, validation, test if test_fraction else None)
    require_every_class(splits, where, "more images (or patients) of it, or another validation_fraction")
    return splits


def _only_to_test(class_names: list[str], samples: Samples) -> Splits:
    none = samples.subset([])
    return Splits(class_names, none, none, samples)


def _require_several_classes(where: object, names: list[str], remedy: str = "") -> None:
    if len(names) < 2:
        raise ValueError(f"{where}: expected at least 2 classes, found only {', '.join(names) or 'none'}{remedy}")


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

    Raises FileNotFoundError if there is no such folder, or of train, val and test only some; ValueError for a class
    without images or one that is missing in val or test.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; expected one with a subfolder of images per class")
    folders = _split_folders(folder)
    notes = _notes_on_others(folder, set(folders.values())) if folders else []
    if folders and "train" not in folders:
        raise FileNotFoundError(
            f"{folder}: found {', '.join(path.name for path in _visible_folders(folder))}, but no train beside them; "
            "expected train, val and, if there is such, test, each with a subfolder of images per class; "
            "rename the one to train on, or give a single one itself"
        )
    train_folder = folders.pop("train", None)
    names, train, strays = _list_classes(train_folder or folder)
    _require_several_classes(folder, names)
    if train_folder is None:
        return replace(split(names, train, validation_fraction, test_fraction, seed, folder), strays=strays)
    strays |= _stray_images(folder)
    parts = {}
    for part, path in folders.items():
        other_names, parts[part], others = _list_classes(path)
        strays |= others
        _require_same_classes(train_folder, names, path, other_names)
    if "validation" not in parts:
        raise FileNotFoundError(
            f"{folder}: found {train_folder.name}, but no val beside it; add one, or give {train_folder} itself"
        )
    return Splits(names, train, **parts, strays=strays, notes=notes)


def _split_folders(folder: Path) -> dict[str, Path]:
    """The subfolders that are named after a split, by split."""
    folders: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        part = SPLIT_NAMES.get(path.name.lower())
        if part is None or not path.is_dir():
            continue
        if part in folders:
            raise ValueError(
                f"{folder}: {folders[part].name} and {path.name} both name the {part} split; put their images into one"
            )
        folders[part] = path
    return folders


def _require_same_classes(train: Path, names: list[str], other: Path, other_names: list[str]) -> None:
    if unknown := sorted(set(other_names) - set(names)):
        raise ValueError(
            f"{other / unknown[0]}: class {', '.join(unknown)} is not in {train}; add it there or remove it"
        )
    if missing := sorted(set(names) - set(other_names)):
        raise ValueError(f"{other}: class {', '.join(missing)} of {train} is missing; add images of it")


def _visible_folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not _is_hidden(path))


def _list_classes(folder: Path) -> tuple[list[str], Samples, dict[str, str]]:
    """Class names in alphabetical order, the images of each class in order of their paths, and why others are none."""
    classes = _visible_folders(folder)
    if not classes:
        raise ValueError(f"{folder}: expected one subfolder of images per class, found none")
    paths: list[str] = []
    labels: list[int] = []
    strays = _stray_images(folder)
    for label, directory in enumerate(classes):
        if directory.name.encode(errors="ignore").decode() != directory.name:  # of no use in a report's pictures
            raise ValueError(f"{folder}: class folder {os.fsencode(directory.name)!r}: not a name in UTF-8; rename it")
        images, others = list_files(directory)
        if not images:
            raise ValueError(f"{directory}: no image in this class folder; add images of it, or remove the folder")
        paths += map(str, images)
        labels += [label] * len(images)
        strays |= {str(path): f"{path}: {OTHER_TYPE}" for path in others}
    return [path.name for path in classes], Samples(paths, torch.tensor(labels)), strays


def _stray_images(folder: Path) -> dict[str, str]:
    """Why the images beside the class folders are left out. (Beside them there may well be other files.)"""
    files = (path for path in sorted(folder.iterdir()) if path.is_file() and not _is_hidden(path))
    return {str(path): f"{path}: in no class folder" for path in files if is_image(path)}


def _notes_on_others(folder: Path, splits: Container[Path]) -> list[str]:
    """What to say of the images in other folders beside those of the splits, if there are any."""
    counts = {path.name: sum(map(_seems_image, _walk(path))) for path in _visible_folders(folder) if path not in splits}
    found = [f"{name} ({count})" for name, count in counts.items() if count]
    if not found:
        return []
    more = [f"and {len(found) - MAX_FOLDERS_NAMED} more"] if len(found) > MAX_FOLDERS_NAMED else []
    where = ", ".join(found[:MAX_FOLDERS_NAMED] + more)
    return [
        f"{folder}: {sum(counts.values())} images in other folders beside the splits are left out, in {where}; "
        "to use them, move them into the class folders of a split"
    ]


def _seems_image(path: Path) -> bool:
    """Whether a file is an image; not, if it may not be read."""
    try:
        return path.is_file() and is_image(path)
    except OSError:
        return False


def _is_hidden(path: Path) -> bool:
    return path.name.startswith(".") or path.name in SYSTEM_FILES


def list_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """The images below `folder`, and the other files, in order. Hidden ones and the system's own are left out.

    A link to nothing is among the images: reading it says what is wrong.
    """
    images: list[Path] = []
    others: list[Path] = []
    for path in sorted(_walk(folder)):
        leads_nowhere = path.is_symlink() and not path.exists()
        if leads_nowhere or path.is_file():
            (images if leads_nowhere or is_image(path) else others).append(path)
    return images, others


def _walk(folder: Path) -> Iterator[Path]:
    """What lies below `folder` and is no folder. Links to folders are followed, but to each folder once: no cycle."""
    seen: set[str] = set()
    for directory, subfolders, names in os.walk(folder, followlinks=True):
        actual = os.path.realpath(directory)
        if actual in seen:
            subfolders.clear()
            continue
        seen.add(actual)
        subfolders[:] = sorted(name for name in subfolders if not _is_hidden(Path(name)))
        yield from (path for path in (Path(directory, name) for name in names) if not _is_hidden(path))


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
    def used(self) -> dict[str, str]:
        """The columns that must be there, and by which option each is named."""
        named: dict[str | None, str] = {self.path: "path_column"}
        named |= dict.fromkeys(self.indicators, "label_columns") or {self.label: "label_column"}
        named |= {self.group: "group_column", self.split: "split_column"}
        return {name: f"--data.{option}" for name, option in named.items() if name}

    @property
    def multi_label(self) -> bool:
        return bool(self.indicators) or self.separator is not None


def read_table(
    table: Path, root: Path, columns: Columns, validation_fraction: float, test_fraction: float, seed: int
) -> Splits:
    """A CSV table with a header: paths relative to `root`, labels, and if wanted groups and splits.

    Raises OSError if the table or all of its files cannot be found, and ValueError for a column that it lacks, an empty
    cell, a label that no training image has, or a single class.
    """
    rows = read_rows(table, columns.used)
    row_classes = [_classes_of(place, row, columns) for place, row in rows.items()]
    parts = [_part_of(place, row, columns) for place, row in rows.items()]
    naming = "test" if set(parts) == {"test"} else "train"  # the part whose labels are the classes
    training = {name for classes, part in zip(row_classes, parts, strict=True) if part == naming for name in classes}
    names = list(columns.indicators) or sorted(training)
    for place, classes, part in zip(rows, row_classes, parts, strict=True):
        if unknown := [name for name in classes if name not in training]:
            raise ValueError(
                f"{place}: label {', '.join(unknown)} of the {part} split is in no training row; "
                "correct it, or add training images of it"
            )
    _require_several_classes(table, names, _remedy_of_one(columns))
    paths = [str(root / filled(place, row, columns.path)) for place, row in rows.items()]
    require_a_file(table, paths, "--data.root")
    labels = _labels(row_classes, names, columns.multi_label)
    groups = [filled(place, row, columns.group).strip() for place, row in rows.items()] if columns.group else None
    if columns.split is not None:
        return _as_told(table, names, Samples(paths, labels, groups), parts)
    # Without groups the rows of one file are one, so that no split falls between them.
    return split(names, Samples(paths, labels, groups or paths), validation_fraction, test_fraction, seed, table)


def _remedy_of_one(columns: Columns) -> str:
    if not columns.multi_label:
        return ""
    if not columns.indicators:
        return "; to tell images with it from those without, name the two classes in the cells, without a separator"
    name = columns.indicators[0]
    return f"; name it with --data.label_column {name} instead of label_columns: then 0 and 1 are the classes"


def require_a_file(where: object, paths: Sequence[str], option: str) -> None:
    """Raise FileNotFoundError if there is none of these files, so that they are looked for in a wrong place."""
    if not any(map(os.path.lexists, paths)):
        raise FileNotFoundError(
            f"{where}: none of the {len(paths)} files that are listed is there, such as {paths[0]}; "
            f"say with {option} what the paths are relative to"
        )


def read_rows(table: Path, needed: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """The rows of a CSV table, by where they stand, as FILE:LINE. Each column `needed` is named by an option.

    Raises ValueError for what is no such table, a missing column, or a row of more or fewer cells than the header.
    """
    try:
        with open(table, newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            header = [name.strip() for name in next(reader, [])]
            rows = {f"{table}:{reader.line_num}": cells for cells in reader if cells}
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{table}: expected a table in UTF-8, got {error.object[error.start : error.end]!r}; save it as UTF-8"
        ) from error
    except csv.Error as error:
        raise ValueError(f"{table}: expected a table of cells with commas between them ({error})") from error
    _check_header(table, header, needed)
    if not rows:
        raise ValueError(f"{table}: no row below its header")
    for place, cells in rows.items():
        if len(cells) != len(header):
            raise ValueError(
                f"{place}: expected {len(header)} cells, as in the header, got {len(cells)}; "
                "complete or remove the row, and quote a cell that holds a comma"
            )
    return {place: dict(zip(header, cells, strict=True)) for place, cells in rows.items()}


def _check_header(table: Path, header: list[str], needed: Mapping[str, str]) -> None:
    if not header:
        raise ValueError(f"{table}: its first line is empty; expected a header with {', '.join(needed)}")
    if repeated := [name for name in needed if header.count(name) > 1]:
        raise ValueError(f"{table}: expected each column once, got {', '.join(repeated)} again; rename all but one")
    missing = {name: option for name, option in needed.items() if name not in header}
    if not missing:
        return
    mark = next((mark for mark in (";", "\t") if mark in header[0]), None) if len(header) == 1 else None
    options = ", ".join(dict.fromkeys(missing.values()))
    remedy = f"save it with commas between the cells, in place of {mark!r}" if mark else f"name another with {options}"
    raise ValueError(f"{table}: no column {', '.join(missing)}; it has {', '.join(header)}; {remedy}")


def filled(place: str, row: Mapping[str, str], column: str) -> str:
    """The cell of a column in which none may be empty."""
    if not row[column].strip():
        raise ValueError(f"{place}: column {column} is empty; fill it in, or remove the row")
    return row[column]


def _classes_of(place: str, row: Mapping[str, str], columns: Columns) -> list[str]:
    if columns.indicators:
        cells = {name: row[name].strip() for name in columns.indicators}
        for name, cell in cells.items():
            if cell not in ("0", "1", "0.0", "1.0"):
                raise ValueError(f"{place}: column {name} must be 0 or 1, got {cell!r}")
        return [name for name, cell in cells.items() if float(cell)]
    if columns.separator is not None:
        return sorted({name.strip() for name in row[columns.label].split(columns.separator)} - {""})
    return [filled(place, row, columns.label).strip()]


def _part_of(place: str, row: Mapping[str, str], columns: Columns) -> str:
    if columns.split is None:
        return "train"  # until the split
    cell = row[columns.split].strip().lower()
    if cell not in SPLIT_NAMES:
        raise ValueError(f"{place}: column {columns.split} must be train, val or test, got {cell!r}")
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
    if set(chosen) == {"test"}:
        return _only_to_test(names, samples)
    if "validation" not in chosen:
        raise ValueError(f"{table}: no row of the validation split; name some val, or leave the split column out")
    splits = Splits(names, chosen["train"], chosen["validation"], chosen.get("test"))
    require_every_class(splits, table, "rows of that split")
    return splits
