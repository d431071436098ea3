"""What counts in a folder of images, and what is said of the rest."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image
from training_cases import make_images

from densenet_efficient.training.folders import read_folder


def names_of_strays(folder: Path, test_fraction: float = 0.0) -> set[str]:
    return {Path(path).name for path in read_folder(folder, 0.5, test_fraction, seed=0).strays}


def test_what_is_hidden_or_the_systems_own_is_no_stray(tmp_path: Path) -> None:
    folder = make_images(tmp_path)
    for place in (folder, folder / "dark"):
        Image.new("L", (9, 9)).save(place / "._0.png")
        (place / "Desktop.ini").write_text("[ViewState]")
    assert not names_of_strays(folder)


@pytest.mark.parametrize("test_fraction", [0, 1])
def test_what_is_left_out_is_told_of_every_split(test_fraction: int, tmp_path: Path) -> None:
    """Where all of them are to test with, too."""
    for part in ("train", "val", "test", "extra"):
        make_images(tmp_path / part)
    (tmp_path / "val" / "dark" / "notes.txt").write_text("where these are from")
    for place in (tmp_path, tmp_path / "test"):
        Image.new("L", (9, 9)).save(place / f"beside {place.name}.png")
    expected = {"notes.txt", f"beside {tmp_path.name}.png", "beside test.png"}
    assert names_of_strays(tmp_path, test_fraction) == expected
    (note,) = read_folder(tmp_path, 0.5, test_fraction, seed=0).notes
    assert "12 images in other folders beside the splits are left out, in extra (12);" in note


def test_a_file_that_is_named_as_a_split_is_none(tmp_path: Path) -> None:
    (make_images(tmp_path) / "Test").write_text("how these were tested")
    assert read_folder(tmp_path, 0.5, 0.0, seed=0).class_names == ["bright", "dark"]
