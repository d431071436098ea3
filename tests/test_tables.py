"""What the cells of a CSV table say: classes, findings, splits and files."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from training_cases import make_images

from densenet_efficient.training.data import CSVData
from densenet_efficient.training.folders import read_folder
from densenet_efficient.training.samples import Splits
from densenet_efficient.training.tables import Columns, read_table, require_a_file


def table_of(folder: Path, header: str, *rows: str) -> Path:
    """Each row is of an image of its own, in the column "path"."""
    for number in range(len(rows)):
        (folder / f"{number}.png").touch()
    lines = [f"path,{header}", *(f"{number}.png,{row}" for number, row in enumerate(rows))]
    (folder / "table.csv").write_text("\n".join(lines))
    return folder / "table.csv"


def read(table: Path, columns: Columns) -> Splits:
    return read_table(table, table.parent, columns, 0.5, 0.0, seed=0)


def test_findings_need_no_column_of_labels_and_keep_their_order(tmp_path: Path) -> None:
    table = table_of(tmp_path, "late,early,split", "1,0,train", "0,1,train", "1,0,val", "0,1,val")
    splits = read(table, Columns(indicators=("late", "early"), split="split"))
    assert splits.class_names == ["late", "early"]
    assert splits.train.labels.tolist() == splits.validation.labels.tolist() == [[1, 0], [0, 1]]


def test_a_finding_that_is_in_no_training_row(tmp_path: Path) -> None:
    table = table_of(tmp_path, "a,b,split", "1,0,train", "0,0,train", "1,0,val", "0,1,val")
    with pytest.raises(ValueError, match=r"table.csv:5: label b of the validation split is in no training row"):
        read(table, Columns(indicators=("a", "b"), split="split"))


def test_a_label_of_the_training_that_is_not_tested(tmp_path: Path) -> None:
    """The classes are those of the training, though there are images to test with."""
    table = table_of(tmp_path, "label,split", "a,train", "b,train", "a,val", "b,val", "a,test")
    with pytest.raises(ValueError, match=r"table.csv: class b: no image in the test split"):
        read(table, Columns(split="split"))


def test_blanks_around_the_labels_of_a_cell(tmp_path: Path) -> None:
    table = table_of(tmp_path, "label,split", "a | b,train", "b,train", "a|b ,val", " a,val")
    splits = read(table, Columns(separator="|", split="split"))
    assert splits.class_names == ["a", "b"]
    assert splits.validation.labels.tolist() == [[1, 1], [1, 0]]


def test_a_file_may_come_again_in_its_group(tmp_path: Path) -> None:
    table = table_of(tmp_path, "label,patient", "a,first", "b,second", "a,third", "b,fourth")
    table.write_text(f"{table.read_text()}\n0.png,a,first")
    assert sum(map(len, read(table, Columns(group="patient")).parts().values())) == 5


def test_a_first_column_named_almost_as_excel_names_its_separator(tmp_path: Path) -> None:
    for number in range(4):
        (tmp_path / f"{number}.png").touch()
    table = tmp_path / "table.csv"
    table.write_text("sepsis,path\nno,0.png\nyes,1.png\nno,2.png\nyes,3.png\n")
    assert read(table, Columns(label="sepsis")).class_names == ["no", "yes"]


def test_some_files_of_a_table_may_be_missing(tmp_path: Path) -> None:
    """The check of the data names them."""
    table = table_of(tmp_path, "label", *"abab")
    (tmp_path / "2.png").unlink()
    assert sum(map(len, read(table, Columns()).parts().values())) == 4


def test_an_empty_separator(tmp_path: Path) -> None:
    message = re.escape("--data.label_separator: expected what stands between the classes of a cell, got nothing")
    with pytest.raises(ValueError, match=message):
        CSVData(table_of(tmp_path, "label", "a", "b"), label_separator="")


def test_links_to_nothing_are_not_in_a_wrong_place(tmp_path: Path) -> None:
    """Reading them says what is wrong."""
    link = tmp_path / "link.png"
    link.symlink_to(tmp_path / "gone.png")
    require_a_file("table.csv", [str(link)], "--data.root")


def test_the_folder_above_that_of_the_classes(tmp_path: Path) -> None:
    make_images(tmp_path / "images")
    message = "expected at least 2 classes, found only images; give the folder whose subfolders are the classes"
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path}: {message}")):
        read_folder(tmp_path, 0.5, 0.0, seed=0)


def test_readers_are_not_fewer_than_none(tmp_path: Path) -> None:
    options: dict[str, Any] = {"num_workers": -1}
    with pytest.raises(ValueError, match=r"--data.num_workers: expected a number of at least 0, got -1"):
        CSVData(table_of(tmp_path, "label", "a", "b"), **options)
