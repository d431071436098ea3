"""Predictions: the model's own, from files, folders and tables, in lines and in a CSV that is continued."""

from __future__ import annotations

import csv
import errno
import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from training_cases import fit, make_images, write_dicom

from densenet_efficient.cli import main
from densenet_efficient.training.checkpoint import ENTRY, SavedClassifier, load_classifier, read_checkpoint
from densenet_efficient.training.images import read_image
from densenet_efficient.training.prediction import CSVWriter, Predictor, views_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve images, and a checkpoint of a run on them."""
    path = tmp_path_factory.mktemp("prediction")
    assert fit(make_images(path / "images"), path / "run", "--trainer.max_epochs", "1") == 0
    return path


@pytest.fixture
def checkpoint(folder: Path) -> Path:
    return folder / "run" / "best.ckpt"


def predict(checkpoint: Path, *arguments: object) -> int:
    return main(["predict", "--checkpoint", str(checkpoint), "--accelerator", "cpu", *map(str, arguments)])


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def own_probabilities(classifier: SavedClassifier, path: str) -> torch.Tensor:
    preprocessing = classifier.preprocessing
    image = preprocessing.transform()(read_image(path, preprocessing.channels, preprocessing.value_range))
    with torch.inference_mode():
        return classifier.model.eval()(image[None]).softmax(1)[0]


def test_a_folder_becomes_a_table_of_the_models_own_probabilities(
    folder: Path, checkpoint: Path, tmp_path: Path
) -> None:
    assert predict(checkpoint, folder / "images", "--output", tmp_path / "out.csv", "--batch_size", 5) == 0
    rows = rows_of(tmp_path / "out.csv")
    assert [row["path"] for row in rows] == sorted(map(str, (folder / "images").rglob("*.png")))
    classifier = load_classifier(checkpoint)
    for row in rows[::5]:
        given = torch.tensor([float(row["bright"]), float(row["dark"])])
        torch.testing.assert_close(given, own_probabilities(classifier, row["path"]), atol=2e-6, rtol=0)
        assert row["prediction"] == ("bright" if given[0] > given[1] else "dark")


def test_a_class_called_as_another_column_has_one_of_its_own(checkpoint: Path, tmp_path: Path) -> None:
    classifier = replace(load_classifier(checkpoint), class_names=["normal", "path"])
    CSVWriter(classifier, "refuse", tmp_path / "out.csv", "none").write(["a.png"], torch.tensor([[0.25, 0.75]]))
    expected = {"path": "a.png", "prediction": "path", "normal": "0.250000", "path (class)": "0.750000"}
    assert rows_of(tmp_path / "out.csv") == [expected]


def test_slices_in_hounsfield_units_are_seen_as_in_training(tmp_path: Path) -> None:
    """Channels and the range of values are the checkpoint's; the files' own window is not used."""
    generator = np.random.default_rng(0)
    window = {"RescaleSlope": 1, "RescaleIntercept": -1000, "WindowCenter": 3000, "WindowWidth": 10}
    for name, level in (("bright", 1200), ("dark", 300)):
        (tmp_path / "images" / name).mkdir(parents=True)
        for index in range(6):
            pixels = level + generator.integers(0, 200, (9, 8))
            write_dicom(tmp_path / "images" / name / f"slice{index}", pixels, **window)
    seen = ("--data.channels", "1", "--data.value_range", "[-1000, 400]", "--trainer.max_epochs", "1")
    assert fit(tmp_path / "images", tmp_path / "run", *seen) == 0
    checkpoint = tmp_path / "run" / "best.ckpt"
    assert predict(checkpoint, tmp_path / "images", "--output", tmp_path / "out.csv") == 0
    rows, classifier = rows_of(tmp_path / "out.csv"), load_classifier(checkpoint)
    assert len(rows) == 12 and classifier.preprocessing.value_range == (-1000, 400)
    assert read_image(rows[0]["path"], 1, (-1000, 400)).min() > 0.5  # by the window all are black
    for row in rows:
        given = torch.tensor([float(row["bright"]), float(row["dark"])])
        torch.testing.assert_close(given, own_probabilities(classifier, row["path"]), atol=2e-6, rtol=0)


def test_what_is_no_image_in_a_folder_is_named(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("L", (9, 9), 200).save(tmp_path / "a.jfif", "JPEG")
    (tmp_path / "notes.txt").write_text("text")
    assert predict(checkpoint, tmp_path) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith(f"{tmp_path / 'a.jfif'}: ")
    assert f"left out as of another type, by its name: {tmp_path / 'notes.txt'}" in captured.err


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_a_table_of_paths(mark: str, folder: Path, checkpoint: Path, tmp_path: Path) -> None:
    """With the mark of UTF-8 at its beginning, as spreadsheets write it, or without."""
    table = folder / "images" / "table.csv"
    table.write_text(f"{mark}file,age\nbright/0.png,40\ndark/1.png,50\n", encoding="utf-8")
    assert predict(checkpoint, table, "--path_column", "file", "--output", tmp_path / "out.csv") == 0
    names = [Path(row["path"]).name for row in rows_of(tmp_path / "out.csv")]
    assert names == ["0.png", "1.png"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("id,path\n1,0.png\n2\n", "table.csv:3: expected 2 cells, as in the header, got 1; complete or remove the row"),
        ("id,path\n1,\n", "table.csv:2: column path is empty; fill it in, or remove the row\n"),
        ("", "table.csv: its first line is empty; expected a header with path\n"),
    ],
)
def test_tables_that_do_not_list_images(
    content: str, message: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "table.csv"
    table.write_text(content)
    assert predict(checkpoint, table) == 2
    error = capsys.readouterr().err
    assert f"error: {tmp_path}/{message}" in error and error.count("\n") == 1


NAMES = (b"a\nb.png", b"m\xfc.png", "u\u2028v.png".encode())  # a line end, Latin-1, and what text takes for a line end


def test_names_of_all_kinds_are_written_and_found_again(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [tmp_path / "images" / os.fsdecode(name) for name in NAMES]
    paths[0].parent.mkdir()
    for path in paths:
        Image.new("L", (9, 9), 200).save(path)
    output = tmp_path / "out.csv"
    arguments = (tmp_path / "images", "--output", output)
    assert predict(checkpoint, *arguments) == 0
    whole = output.read_bytes()
    assert all(name in whole for name in NAMES)
    with open(output, newline="", encoding="utf-8", errors="surrogateescape") as file:
        assert [Path(row["path"]) for row in csv.DictReader(file)] == paths
    capsys.readouterr()
    assert predict(checkpoint, *arguments) == 0
    assert capsys.readouterr().out == f"3 predictions are in {output}; 0 to go\n"
    for cut in (whole.index(b"\nb.png") + 1, whole.index(b"b.png"), len(whole) - 1, whole.index(b"\xa8v")):
        output.write_bytes(whole[:cut])
        assert predict(checkpoint, *arguments) == 0
        assert output.read_bytes() == whole


def test_a_name_that_is_not_utf8_is_printed(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("L", (9, 9), 200).save(tmp_path / os.fsdecode(NAMES[1]), "PNG")
    assert predict(checkpoint, tmp_path) == 0
    assert capsys.readouterr().out.startswith(f"{tmp_path}/m\\xfc.png: ")


@pytest.mark.own_process
@pytest.mark.filterwarnings("error:Total length of .DataLoader.")  # of a table that is complete, were it begun again
@pytest.mark.parametrize("views", ["none", "dihedral"])
def test_an_interrupted_table_is_continued(
    views: str, folder: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.csv"
    assert predict(checkpoint, folder / "images", "--output", output, "--views", views) == 0
    whole = output.read_bytes()
    output.write_bytes(whole[: len(whole) * 2 // 3])  # in the middle of a row
    again = ("--output", output, "--views", views, "--num_workers", 1)
    assert predict(checkpoint, folder / "images", *again) == 0
    assert output.read_bytes() == whole
    assert "7 predictions are in" in capsys.readouterr().out
    assert predict(checkpoint, folder / "images", *again) == 0
    assert capsys.readouterr().out == f"12 predictions are in {output}; 0 to go\n"
    assert output.read_bytes() == whole


def test_a_table_is_of_one_model_alone(
    folder: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.csv"
    assert predict(checkpoint, folder / "images", "--output", output) == 0
    whole = output.read_bytes()
    content = read_checkpoint(checkpoint)
    content["state_dict"]["model.classifier.bias"] += 1
    torch.save(content, tmp_path / "other.ckpt")
    content = read_checkpoint(checkpoint)
    content[ENTRY]["preprocessing"]["stretch"] = not content[ENTRY]["preprocessing"]["stretch"]
    torch.save(content, tmp_path / "other images.ckpt")
    others = ((tmp_path / "other.ckpt",), (tmp_path / "other images.ckpt",))
    for given in ((checkpoint, "--views", "mirror"), *others):
        assert predict(given[0], folder / "images", "--output", output, *given[1:]) == 2
        assert "holds predictions of other weights or --views (out.csv.json" in capsys.readouterr().err
    assert output.read_bytes() == whole


@pytest.fixture
def table(folder: Path, tmp_path: Path) -> Path:
    """A table of the images that lies elsewhere."""
    paths = sorted((folder / "images").rglob("*.png"))
    (tmp_path / "lists").mkdir()
    lines = ["image", *(str(path.relative_to(folder / "images")) for path in paths)]
    (tmp_path / "lists" / "table.csv").write_text("\n".join(lines))
    return tmp_path / "lists" / "table.csv"


def test_paths_are_relative_to_a_root(
    table: Path, folder: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The remedy of the errors, without another --output. A path that is absolute stays as it is."""
    output = tmp_path / "out.csv"
    assert predict(checkpoint, table, "--output", output) == 2
    assert f"{table}: no column path; it has image; name another with --path_column\n" in capsys.readouterr().err
    given = (table, "--path_column", "image", "--output", output)
    assert predict(checkpoint, *given) == 2
    error = capsys.readouterr().err
    assert f"{table}: none of the 12 files that are listed is there, such as {table.parent}/bright/0.png; say" in error
    table.write_text(table.read_text() + f"\n{folder / 'images' / 'dark' / '0.png'}")
    rooted = (*given, "--root", folder / "images")
    assert predict(checkpoint, *rooted) == 0
    assert [row["path"] for row in rows_of(output)] == sorted(map(str, (folder / "images").rglob("*.png")))
    whole = output.read_bytes()
    output.write_bytes(whole[: len(whole) // 2])
    assert predict(checkpoint, *rooted) == 0
    assert output.read_bytes() == whole


def test_a_table_is_of_one_root_alone(
    table: Path,
    folder: Path,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A relative one is another in another working directory."""
    output = tmp_path / "out.csv"
    given = (table, "--path_column", "image", "--output", output)
    monkeypatch.chdir(folder)
    assert predict(checkpoint, *given, "--root", "images") == 0
    whole = output.read_bytes()
    theirs = f"{output}: holds predictions with --root images (in {folder}), not"
    for root in (("--root", folder / "images"), ()):
        assert predict(checkpoint, *given, *root) == 2
        ours = f"with --root {root[1]}" if root else "without --root"
        assert f"{theirs} {ours}; give the same, or name another --output\n" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    assert predict(checkpoint, *given, "--root", "images") == 2
    assert f"{theirs} with --root images (in {tmp_path}); give" in capsys.readouterr().err
    assert output.read_bytes() == whole
    monkeypatch.chdir(folder)
    assert predict(checkpoint, *given, "--root", "images/") == 0


def test_a_table_of_no_root_takes_none_later(
    folder: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """So too one that an earlier version has begun, which is continued without."""
    output = tmp_path / "out.csv"
    assert predict(checkpoint, folder / "images", "--output", output) == 0
    assert set(json.loads((tmp_path / "out.csv.json").read_text())) == {"weights_sha256", "views"}
    assert predict(checkpoint, folder / "images", "--output", output, "--root", tmp_path) == 2
    assert f"holds predictions without --root, not with --root {tmp_path}; give the" in capsys.readouterr().err


@pytest.mark.own_process
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_prediction_that_is_told_to_stop(
    number: signal.Signals,
    workers: int,
    folder: Path,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """At once, with the shell's status; the handlers are then as they were."""
    output = tmp_path / "out.csv"
    before = [signal.getsignal(other) for other in (signal.SIGTERM, signal.SIGINT)]
    arguments = (folder / "images", "--output", output, "--batch_size", 2, "--num_workers", workers)
    own = CSVWriter.write

    def write(self: CSVWriter, paths: list[str], probabilities: torch.Tensor) -> None:
        own(self, paths, probabilities)
        if len(rows_of(output)) == 4:
            signal.raise_signal(number)

    with monkeypatch.context() as patch:
        patch.setattr(CSVWriter, "write", write)
        assert predict(checkpoint, *arguments) == 128 + number
    assert capsys.readouterr().err.endswith("Interrupted; the same command goes on\n")
    assert len(rows_of(output)) == 4
    assert [signal.getsignal(other) for other in (signal.SIGTERM, signal.SIGINT)] == before
    assert predict(checkpoint, *arguments) == 0
    assert [row["path"] for row in rows_of(output)] == sorted(map(str, (folder / "images").rglob("*.png")))


def test_a_full_disk(
    folder: Path,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "out.csv"
    arguments = (folder / "images", "--output", output, "--batch_size", 5)
    assert predict(checkpoint, *arguments) == 0
    whole = output.read_bytes()
    output.write_bytes(whole[: len(whole) * 2 // 3])
    own = CSVWriter._open

    def open_full(self: CSVWriter, mode: Any) -> TextIO:
        file = own(self, mode)
        file.write("half a r")
        file.close()
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(CSVWriter, "_open", open_full)
        assert predict(checkpoint, *arguments) == 2
    error = capsys.readouterr().err
    assert error.endswith(f"error: {output}: No space left on device; make room, and the same command goes on\n")
    assert predict(checkpoint, *arguments) == 0
    assert output.read_bytes() == whole


def test_folders_in_place_of_files(
    folder: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert predict(checkpoint, folder / "images", "--output", tmp_path) == 2
    assert f"error: {tmp_path}: A folder; give --output a table in it\n" in capsys.readouterr().err
    assert predict(tmp_path, folder / "images") == 2
    assert f"error: {tmp_path}: A folder; expected a checkpoint written by densenet-efficient fit\n" in (
        capsys.readouterr().err
    )


def test_an_output_that_is_no_table(
    folder: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.csv"
    output.write_text(f'path,"{"x" * 140_000}')
    arguments = (folder / "images", "--output", output)
    assert predict(checkpoint, *arguments) == 2
    assert f"error: {output}: holds something else than predictions of these classes" in capsys.readouterr().err
    output.unlink()
    assert predict(checkpoint, *arguments) == 0
    origin = tmp_path / "out.csv.json"
    origin.write_text('{"weights_sha256": "')
    assert predict(checkpoint, *arguments) == 2
    error = capsys.readouterr().err
    assert error.endswith(
        f"error: {origin}: is damaged, and tells no more of which weights out.csv is; name another --output\n"
    )


def test_options_in_a_file(folder: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = {"checkpoint": str(checkpoint), "views": "mirror", "batch_size": 5, "output": str(tmp_path / "out.csv")}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(config))
    arguments = ["predict", "--config", str(tmp_path / "mine.yaml"), str(folder / "images")]
    assert main([*arguments, "--accelerator", "cpu"]) == 0
    assert len(rows_of(tmp_path / "out.csv")) == 12
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(config | {"vews": "mirror"}))
    capsys.readouterr()  # the first command may have named a file that is no image
    assert main(arguments) == 2
    assert "vews" in (error := capsys.readouterr().err) and "mine.yaml" in error and error.count("\n") == 1


def test_what_other_classes_have_predicted_is_left_alone(
    folder: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.csv"
    output.write_text("path,prediction,cat,dog\n")
    assert predict(checkpoint, folder / "images", "--output", output) == 2
    assert "something else than predictions of these classes" in capsys.readouterr().err


def test_bad_files_stop_or_are_left_out(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("L", (9, 9), 200).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_text("no image")
    Image.new("L", (9, 9), 20).save(tmp_path / "c.png")
    assert predict(checkpoint, tmp_path, "--batch_size", 1) == 2
    captured = capsys.readouterr()
    assert captured.out.startswith(f"{tmp_path / 'a.png'}: ")
    assert f"error: {tmp_path / 'b.png'}: expected an undamaged image" in captured.err
    assert predict(checkpoint, tmp_path, "--bad_files", "skip", "--output", tmp_path / "out.csv") == 0
    assert [Path(row["path"]).name for row in rows_of(tmp_path / "out.csv")] == ["a.png", "c.png"]
    assert f"skipped: {tmp_path / 'b.png'}" in capsys.readouterr().err


def test_a_file_that_a_table_lists_may_be_missing(
    folder: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there, missing = folder / "images" / "dark" / "0.png", tmp_path / "none.png"
    (tmp_path / "table.csv").write_text(f"path\n{there}\nnone.png\n")
    assert predict(checkpoint, tmp_path / "table.csv") == 2
    assert f"error: {missing}: No such file or directory; leave such files out with" in capsys.readouterr().err
    assert predict(checkpoint, tmp_path / "table.csv", "--bad_files", "skip") == 0
    captured = capsys.readouterr()
    assert captured.out.startswith(f"{there}: ") and captured.out.count("\n") == 1
    assert f"skipped: {missing}: No such file or directory\n" in captured.err


def test_a_folder_without_images(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert predict(checkpoint, tmp_path) == 2
    assert f"error: {tmp_path}: found no image; expected image files, folders or CSV tables" in capsys.readouterr().err


def test_views_are_the_symmetries_of_the_square(checkpoint: Path) -> None:
    images = torch.randn(2, 3, 8, 8)
    for views, count in (("none", 1), ("mirror", 2), ("dihedral", 8)):
        made = list(views_of(images, views))
        assert len({tuple(view.flatten().tolist()) for view in made}) == count
    classifier = load_classifier(checkpoint)
    predictor = Predictor(classifier, "dihedral").eval()
    turned = images.rot90(1, (2, 3)).flip(3)
    with torch.inference_mode():
        first, second = (predictor.predict_step(type(batch)(*batch), 0) for batch in _batches(images, turned))
    assert first is not None and second is not None
    torch.testing.assert_close(first, second)
    torch.testing.assert_close(first.sum(1), torch.ones(2))


def _batches(*images: torch.Tensor) -> list:
    from densenet_efficient.training.prediction import Batch

    return [Batch(image, ["a", "b"], []) for image in images]


def test_several_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = make_images(tmp_path / "images")
    lines = ["path,label"]
    for index, path in enumerate(sorted(images.rglob("*.png"))):
        lines.append(f"{path.relative_to(images)},{'grey|' * (index % 2)}{path.parent.name}")
    (images / "table.csv").write_text("\n".join(lines))
    table = images / "table.csv"
    options = ("--data.label_separator", "|", "--trainer.max_epochs", "1", "--report", "true")
    assert fit(table, tmp_path / "run", *options) == 0
    assert predict(tmp_path / "run" / "best.ckpt", images / "dark", "--output", tmp_path / "out.csv") == 0
    rows = rows_of(tmp_path / "out.csv")
    assert list(rows[0]) == ["path", "prediction", "bright", "dark", "grey"]
    for row in rows:
        seen = [name for name in ("bright", "dark", "grey") if float(row[name]) >= 0.5]
        assert row["prediction"] == "|".join(seen)


def test_the_same_relative_paths_of_another_folder_are_not_taken_for_predicted(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for patient in ("first", "second"):
        make_images(tmp_path / patient / "images", per_class=1)
    output = tmp_path / "out.csv"
    monkeypatch.chdir(tmp_path / "first")
    for _ in range(2):
        assert predict(checkpoint, "images", "--output", output) == 0
    monkeypatch.chdir(tmp_path / "second")
    capsys.readouterr()
    assert predict(checkpoint, "images", "--output", output) == 2
    assert f"predictions without --root (in {tmp_path / 'first'}), not" in capsys.readouterr().err
    origin = output.with_name("out.csv.json")
    origin.write_text(json.dumps({k: v for k, v in json.loads(origin.read_text()).items() if k != "working_directory"}))
    assert predict(checkpoint, "images", "--output", output) == 0  # a table of an earlier version


def test_an_accelerator_that_is_not_there(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", "--checkpoint", str(checkpoint), "--accelerator", "mps", "examples/digit.png"]) == 2
    [error] = capsys.readouterr().err.splitlines()[-1:]
    assert error.startswith("error: ")
    assert "accelerator" in error


def test_a_disk_that_fails_is_not_called_full(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = CSVWriter(load_classifier(checkpoint), "refuse", tmp_path / "out.csv", "none")

    def fail(mode: str) -> TextIO:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(writer, "_open", fail)
    with pytest.raises(OSError, match=r"^\[Errno 5\] Input/output error$"):
        writer.write(["a.png"], torch.tensor([[0.25, 0.75]]))
