"""Samples that CSV tables list, by their paths and labels."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from densenet_efficient.training.samples import (
    SPLIT_NAMES,
    Samples,
    Splits,
    only_to_test,
    require_every_class,
    require_several_classes,
    split,
    tests_with_all,
)


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
    require_several_classes(table, names, _remedy_of_one(columns))
    paths = [str(root / filled(place, row, columns.path)) for place, row in rows.items()]
    require_a_file(table, paths, "--data.root")
    labels = _labels(row_classes, names, columns.multi_label)
    groups = [filled(place, row, columns.group).strip() for place, row in rows.items()] if columns.group else None
    if groups is not None:
        _require_one_group(list(rows), paths, groups)
    if columns.split is not None:
        samples = Samples(paths, labels, groups)
        if tests_with_all(table, test_fraction):
            return only_to_test(names, samples)
        return _as_told(table, names, samples, parts)
    # Without groups the rows of one file are one, so that no split falls between them.
    return split(names, Samples(paths, labels, groups or paths), validation_fraction, test_fraction, seed, table)


def _require_one_group(places: Sequence[str], paths: Sequence[str], groups: Sequence[str]) -> None:
    """Raises ValueError for a file of two groups, whose rows a split could separate."""
    first: dict[str, int] = {}
    for index, path in enumerate(paths):
        other = first.setdefault(path, index)
        if groups[other] != groups[index]:
            raise ValueError(
                f"{places[index]}: {path} is of group {groups[index]}, and of {groups[other]} at {places[other]}; "
                "correct one of them"
            )


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
        remedy = f"say with {option} what the paths are relative to"
        if os.path.lexists(paths[0].replace("\\", "/")):
            remedy = "write them with / between folders"
        elif os.path.lexists(paths[0].strip()):
            remedy = "remove the blanks around them"
        raise FileNotFoundError(
            f"{where}: none of the {len(paths)} files that are listed is there, such as {paths[0]}; {remedy}"
        )


def read_rows(table: Path, needed: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """The rows of a CSV table, by where they stand, as FILE:LINE. Each column `needed` is named by an option.

    Raises ValueError for what is no such table, a missing column, or a row of more or fewer cells than the header.
    """
    try:
        with open(table, newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            header = [name.strip() for name in next(reader, [])]
            if header and header[0].startswith("sep="):  # for Excel
                header = [name.strip() for name in next(reader, [])]
            rows = {f"{table}:{reader.line_num}": cells for cells in reader if any(map(str.strip, cells))}
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
    mark = next((mark for mark in (";", "\t") if mark in header[0]), None)
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
        return only_to_test(names, samples)
    if "validation" not in chosen:
        raise ValueError(f"{table}: no row of the validation split; name some val, or leave the split column out")
    splits = Splits(names, chosen["train"], chosen["validation"], chosen.get("test"))
    require_every_class(splits, table, "rows of that split")
    return splits
