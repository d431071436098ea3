"""Image files of all kinds, and what is damaged, repeated or in the wrong place among them."""

from __future__ import annotations

import os
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageOps
from PIL.PngImagePlugin import PngImageFile
from training_cases import make_images, make_patients, write_dicom, write_table

from densenet_efficient.cli import main
from densenet_efficient.training.data import FolderData
from densenet_efficient.training.datasets import DigitsData
from densenet_efficient.training.images import read_image
from densenet_efficient.training.preprocessing import normalisation

SMALL: dict[str, Any] = {"image_size": 8, "batch_size": 4, "num_workers": 0}


def test_grey_images_are_normalised_by_the_average_of_imagenets_channels() -> None:
    mean, std = normalisation(1)
    assert (*mean, *std) == pytest.approx(((0.485 + 0.456 + 0.406) / 3, (0.229 + 0.224 + 0.225) / 3))


def test_a_mean_or_deviation_that_is_given_is_taken_in_place_of_the_data_sets_own() -> None:
    preprocessings = DigitsData(std=[0.5]).preprocessing, DigitsData(mean=[0.3]).preprocessing
    assert [(one.mean, one.std) for one in preprocessings] == [((0.305,), (0.5,)), ((0.3,), (0.376,))]


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


def test_tiff_of_twelve_bits(tmp_path: Path) -> None:
    """Two pixels are three bytes."""
    pixels = bytes([0x00, 0x0F, 0xFF, 0x80, 0x00, 0x00])  # 0, 4095, 2048, 0
    tags = {256: 2, 257: 2, 258: 12, 259: 1, 262: 1, 273: 128, 277: 1, 278: 2, 279: len(pixels)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    head = struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + entries + bytes(4)
    (tmp_path / "deep.tif").write_bytes(head.ljust(tags[273], b"\0") + pixels)
    values = read_image(tmp_path / "deep.tif", 1)[0].numpy()
    np.testing.assert_allclose(values, [[0, 1], [2048 / 4095, 0]], atol=1e-6)


def test_an_image_of_lab_colours_in_grey(tmp_path: Path) -> None:
    Image.new("LAB", (4, 2), (255, 128, 128)).save(tmp_path / "lab.tif")
    assert read_image(tmp_path / "lab.tif", 1).min() > 250
    assert read_image(tmp_path / "lab.tif", 3).min() > 250


def test_an_error_that_is_pillows_own_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of damaged AVIF it raises RuntimeError."""
    Image.new("L", (4, 2)).save(tmp_path / "image.png")

    def load(self: Image.Image) -> None:
        raise RuntimeError("Failed to decode image")

    monkeypatch.setattr(PngImageFile, "load", load)
    with pytest.raises(ValueError, match=r"image.png: expected an undamaged image .*\(Failed to decode image\)"):
        read_image(tmp_path / "image.png", 1)


@pytest.mark.parametrize("most", [4095, 65535])
def test_deep_pgm(most: int, tmp_path: Path) -> None:
    deep = np.array([[0, 1000], [2048, most]], dtype=">u2")
    (tmp_path / "deep.pgm").write_bytes(b"P5\n2 2\n%d\n" % most + deep.tobytes())
    np.testing.assert_allclose(read_image(tmp_path / "deep.pgm", 1)[0].numpy(), deep / most, atol=1e-5)


def test_a_tiff_of_several_pages(tmp_path: Path) -> None:
    pages = [Image.new("L", (9, 9), value) for value in (10, 20, 30)]
    pages[0].save(tmp_path / "one.tif")
    assert read_image(tmp_path / "one.tif", 1).unique().tolist() == [10]
    pages[0].save(tmp_path / "pages.tif", save_all=True, append_images=pages[1:])
    with pytest.raises(ValueError, match=r"^/.*pages.tif: expected a TIFF of one page, got 3; export the pages$"):
        read_image(tmp_path / "pages.tif", 1)


def test_a_tiff_whose_second_page_is_damaged(tmp_path: Path) -> None:
    Image.new("L", (9, 9)).save(tmp_path / "whole.tif", save_all=True, append_images=[Image.new("L", (9, 9))])
    width = b"\x00\x01\x04\x00\x01"  # tag 256, and how it is stored
    first, _, second = (tmp_path / "whole.tif").read_bytes().rpartition(width)
    assert first.count(width) == 1
    (tmp_path / "damaged.tif").write_bytes(first + b"\x99" + width[1:] + second)
    with pytest.raises(ValueError, match=r"damaged.tif: expected an undamaged image .* \(Missing dimensions\)$"):
        read_image(tmp_path / "damaged.tif", 1)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_no_numbers(value: float, tmp_path: Path) -> None:
    Image.fromarray(np.array([[0.5, value], [value, 1]], dtype=np.float32)).save(tmp_path / "odd.tif")
    message = r"^/.*odd.tif: expected numbers, got 2 of 4 values that are infinite or not a number; replace those$"
    with pytest.raises(ValueError, match=message):
        read_image(tmp_path / "odd.tif", 1, (0, 1))


UPRIGHT = np.arange(6, dtype=np.uint8).reshape(2, 3) * 40


@pytest.mark.parametrize("kind", ["png", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_upright(orientation: int, kind: str, tmp_path: Path) -> None:
    image = Image.fromarray(UPRIGHT).convert("RGB")
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    options: dict[str, Any] = {"webp": {"lossless": True}}.get(kind, {})
    image.save(tmp_path / f"image.{kind}", exif=exif, **options)
    with Image.open(tmp_path / f"image.{kind}") as saved:
        expected = np.asarray(ImageOps.exif_transpose(saved).convert("L"))
    np.testing.assert_array_equal(read_image(tmp_path / f"image.{kind}", 1)[0].numpy(), expected)
    assert (expected.shape == UPRIGHT.shape) == (orientation < 5)


@pytest.mark.parametrize("kind", ["png", "webp", "jpg"])
@pytest.mark.parametrize("exif", [b"garbagegarbage", b"Exif\0\0garbageg", b"II*\0\xff\xff\xff\xff", b"MM\0*"])
def test_damaged_exif_data_leave_the_image_as_it_is(exif: bytes, kind: str, tmp_path: Path) -> None:
    image = Image.fromarray(UPRIGHT).convert("RGB")
    options: dict[str, Any] = {"webp": {"lossless": True}}.get(kind, {})
    image.save(tmp_path / f"image.{kind}", exif=exif, **options)
    image.save(tmp_path / f"plain.{kind}", **options)
    whole, plain = (read_image(tmp_path / f"{name}.{kind}", 3) for name in ("image", "plain"))
    assert torch.equal(whole, plain)


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


def test_weights_are_of_the_images_that_can_be_read(tmp_path: Path) -> None:
    for part in ("train", "val"):
        make_images(tmp_path / part, per_class=10)
    for index in range(4):
        (tmp_path / "train" / "dark" / f"{index}.png").write_bytes(b"")
    weighed = FolderData(tmp_path, bad_files="skip", class_weights=True, **SMALL).task.class_weights
    torch.testing.assert_close(weighed, torch.tensor([16 / 20, 16 / 12]))
    sampler = FolderData(tmp_path, bad_files="skip", weighted_sampling=True, **SMALL).train_dataloader().epoch_sampler
    torch.testing.assert_close(sampler.weights, torch.tensor([1 / 10] * 10 + [1 / 6] * 6))


def test_a_link_to_nothing_is_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    link = make_images(tmp_path) / "dark" / "link"
    link.symlink_to(tmp_path / "none.png")
    with pytest.raises(ValueError, match=f"1 of 13 files cannot be read .*{link}: No such file or directory"):
        FolderData(tmp_path, **SMALL).setup("fit")
    data = FolderData(tmp_path, bad_files="skip", **SMALL)
    assert sum(map(len, data.splits.parts().values())) == 12


def test_a_file_that_is_damaged_or_gone_after_the_check(tmp_path: Path) -> None:
    data = FolderData(make_images(tmp_path), **SMALL)
    data.setup("fit")
    remedy = (
        "replace the file, or leave it out with --data.bad_files skip; a training then goes on with --ckpt_path last"
    )
    path = data.splits.validation.sources[0]
    Path(path).write_text("no image")
    with pytest.raises(ValueError, match=f"^{path}: expected an undamaged image such as [^(]* or DICOM; {remedy}$"):
        next(iter(data.val_dataloader()))
    Path(path).unlink()
    with pytest.raises(FileNotFoundError, match=f"^{path}: No such file or directory; {remedy}$"):
        next(iter(data.val_dataloader()))


def test_an_image_in_no_class_folder_is_named(tmp_path: Path) -> None:
    Image.new("L", (9, 9)).save(make_images(tmp_path) / "stray.png")
    (tmp_path / "README.txt").write_text("where these are from")
    with pytest.raises(ValueError, match=r"1 of 13 files .*stray.png: in no class folder\. "):
        FolderData(tmp_path, **SMALL).setup("fit")


def test_an_image_beside_the_splits_is_named(tmp_path: Path) -> None:
    for part in ("train", "val"):
        make_images(tmp_path / part)
    Image.new("L", (9, 9)).save(tmp_path / "stray.png")
    (tmp_path / "README.txt").write_text("where these are from")
    with pytest.raises(ValueError, match=r"1 of 25 files .*stray.png: in no class folder\. "):
        FolderData(tmp_path, **SMALL).setup("fit")


def test_files_that_may_not_be_read_beside_the_splits_are_no_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are not trained on, so a training goes on; but one in a split would stop it."""
    for part in ("train", "val", "extra"):
        make_images(tmp_path / part)

    def is_image(path: Path) -> bool:
        if "extra" in path.parts:
            raise PermissionError(13, "Permission denied", str(path))
        return True

    monkeypatch.setattr("densenet_efficient.training.folders.is_image", is_image)
    FolderData(tmp_path, **SMALL).setup("fit")
    assert "other folders" not in capsys.readouterr().out


def test_images_in_folders_beside_the_splits_are_mentioned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for part in ("train", "val"):
        make_images(tmp_path / part)
    make_images(tmp_path / "extra" / "more", names=("bright",))
    write_dicom(tmp_path / "extra" / "slice", np.arange(48).reshape(6, 8))
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "README.txt").write_text("where these are from")
    (tmp_path / "notes" / "locked").symlink_to(tmp_path / "none")
    note = (
        f"{tmp_path}: 7 images in other folders beside the splits are left out, in extra (7); "
        "to use them, move them into the class folders of a split\n"
    )
    data = FolderData(tmp_path, **SMALL)
    data.setup("fit")
    assert note in capsys.readouterr().out
    assert sum(map(len, data.splits.parts().values())) == 24
    main(["check-data", "--data", str(tmp_path), "--data.bad_files", "skip"])
    assert note in capsys.readouterr().out
    for index in range(20):
        make_images(tmp_path / f"more{index:02}", names=("bright",), per_class=1)
    FolderData(tmp_path, **SMALL).setup("fit")
    assert re.search(
        r" 27 images .* in extra \(7\), more00 \(1\), .*, more08 \(1\), and 11 more; to ", capsys.readouterr().out
    )


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
    assert "bright │     6 │          6" in out and "dark   │     6 │          6" in out
    assert main(["check-data", "--data", "digits"]) == 0


def test_check_data_finds_rows_of_the_same_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = make_patients(tmp_path)
    for row in rows[5:10] + rows[15:]:
        row["split"] = "val"
    first, second, third = rows[0], rows[1], rows[2]
    again = [first | {"split": "val"}, second | {"label": "dark"}, third]
    table = write_table(tmp_path / "table.csv", rows + again)
    assert main(["check-data", "--data", str(table), "--data.split_column", "split"]) == 1
    out = capsys.readouterr().out
    paths = [tmp_path / row["path"] for row in (first, second, third)]
    assert f"In more than one split: {paths[0]} (train, bright) = {paths[0]} (validation, bright)\n" in out
    assert f"With different labels: {paths[1]} (train, bright) = {paths[1]} (train, dark)\n" in out
    assert f"Repeated: {paths[2]} (train, bright) = {paths[2]} (train, bright)\n" in out
    assert "0 files cannot be read, 1 are in more than one split, 1 are repeated, 1 have different labels" in out


def test_check_data_names_the_labels_of_rows_with_several(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_images(tmp_path, per_class=4)
    rows = [{"path": f"{name}/{index}.png", "label": "a|b"} for name in ("bright", "dark") for index in range(4)]
    table = write_table(tmp_path / "table.csv", [*rows, rows[0] | {"label": ""}])
    assert main(["check-data", "--data", str(table), "--data.label_separator", "|"]) == 1
    assert re.search(r"With different labels: \S+/bright/0.png \(\w+, a\|b\) = \S+ \(\w+, \)", capsys.readouterr().out)


def test_check_data_names_files_whose_names_are_not_utf8(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = os.fsdecode(b"m\xfc.png")
    (make_images(tmp_path) / "dark" / name).write_bytes(b"")
    assert main(["check-data", "--data", str(tmp_path)]) == 1
    assert f"Unreadable: {tmp_path}/dark/m\\xfc.png: expected" in capsys.readouterr().out
    FolderData(tmp_path, bad_files="skip", **SMALL)
    assert f"files: {tmp_path}/dark/m\\xfc.png: expected" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_films_as_tiff_are_turned_into_positives(dtype: Any, tmp_path: Path) -> None:
    Image.fromarray(np.linspace(0, np.iinfo(dtype).max, 48, dtype=dtype).reshape(6, 8)).save(tmp_path / "print.tif")
    black_is_zero = b"\x06\x01\x03\x00\x01\x00\x00\x00\x01"  # tag 262 as one number of 16 bits
    content = (tmp_path / "print.tif").read_bytes()
    assert content.count(black_is_zero) == 1
    (tmp_path / "film.tif").write_bytes(content.replace(black_is_zero, black_is_zero[:-1] + b"\x00"))
    film, positive = (read_image(tmp_path / name, 1).float() for name in ("film.tif", "print.tif"))
    torch.testing.assert_close(film, positive.max() - positive)


def test_a_lack_of_memory_is_not_taken_for_a_damaged_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("L", (4, 4)).save(tmp_path / "image.png")

    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(MemoryError):
        read_image(tmp_path / "image.png", 1, None)
