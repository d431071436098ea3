"""What the training commands make of configs, recipes and loggers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from training_cases import fails, fit, fit_arguments, make_images, make_patients, write_table

from densenet_efficient import cli as command_line
from densenet_efficient.cli import main, one_line
from densenet_efficient.training import cli
from densenet_efficient.training.check import examine_data
from densenet_efficient.training.checkpoint import read_checkpoint
from densenet_efficient.training.data import ImageData
from densenet_efficient.training.recipes import FOLDER, recipe_names, recipe_path
from densenet_efficient.training.shorthands import expand_shorthands


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return make_images(tmp_path / "images")


@pytest.fixture
def examined(monkeypatch: pytest.MonkeyPatch) -> list[ImageData]:
    """The data that check-data examines."""
    seen: list[ImageData] = []

    def examine(splits: object, read_source: object) -> object:
        seen.append(read_source.__self__)  # type: ignore[attr-defined]
        return examine_data(splits, read_source)  # type: ignore[arg-type]

    monkeypatch.setattr(cli, "examine_data", examine)
    return seen


def test_check_data_takes_the_data_of_a_recipe(images: Path, examined: list[ImageData]) -> None:
    """The command line wins, as in a training."""
    assert main(["check-data", "--config", "lung-disease", "--data", str(images), "--data.batch_size", "2"]) == 0
    data = examined[0]
    assert (data.preprocessing.image_size, data.preprocessing.stretch, data.batch_size) == (320, True, 2)
    assert data.splits.test is not None


def test_check_data_takes_the_data_of_a_run(images: Path, tmp_path: Path, examined: list[ImageData]) -> None:
    """With its seed, from which the splits follow."""
    options = ("--seed_everything", "5", "--trainer.max_epochs", "1", "--trainer.fast_dev_run", "false")
    assert fit(images, tmp_path / "run", *options) == 0
    assert main(["check-data", "--config", str(tmp_path / "run" / "config.yaml")]) == 0
    assert (examined[0].seed, examined[0].preprocessing.image_size) == (5, 8)


@pytest.mark.parametrize("given", [["--data", ""], ["--data="]])
def test_an_empty_name_is_not_the_folder_one_is_in(
    given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a variable of the shell that is not set."""
    monkeypatch.chdir(make_images(tmp_path))
    with pytest.raises(ValueError, match=r"^--data : not such a file; expected a folder of images, a table ending in"):
        expand_shorthands(["fit", *given])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("data: {class_path: DigitsData, init_args: {batch_sise: 4}}", "--data.batch_sise: DigitsData has no such"),
        ("data: [", "expected YAML, got a file that is none"),
        ("digits", "expected options as of densenet-efficient fit, got digits"),
        ("model: {network: densenet121}", "the following arguments are required: --data"),
    ],
)
def test_a_config_from_which_check_data_learns_nothing(
    config: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.yaml").write_text(config)
    error = fails(["check-data", "--config", str(tmp_path / "mine.yaml")], capsys)
    assert message in error and str(tmp_path / "mine.yaml") in error


def test_check_data_takes_a_kind_of_data_by_name(tmp_path: Path, examined: list[ImageData]) -> None:
    (tmp_path / "mine.yaml").write_text("data: DigitsData\nseed_everything: true\n")
    assert main(["check-data", "--config", str(tmp_path / "mine.yaml"), "--data.batch_size", "4"]) == 0
    assert (examined[0].batch_size, examined[0].seed) == (4, 0)


def test_a_run_without_a_logger(images: Path, tmp_path: Path) -> None:
    assert fit(images, tmp_path / "run", "--trainer.logger", "false", "--trainer.max_epochs", "1") == 0
    assert read_checkpoint(tmp_path / "run" / "last.ckpt")["callbacks"]["History"]["records"]
    assert not (tmp_path / "run" / "logs").exists()


def test_a_folder_of_a_recipes_name_is_not_its_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in (*recipe_names(), "other"):
        (tmp_path / name).mkdir()
    assert [recipe_path(name) for name in recipe_names()] == [str(FOLDER / f"{name}.yaml") for name in recipe_names()]
    with pytest.raises(FileNotFoundError, match="--config other: no such file, and no such recipe"):
        recipe_path("other")
    (tmp_path / "mine.yaml").touch()
    assert recipe_path("mine.yaml") == "mine.yaml"


@pytest.mark.parametrize("command", ["fit", "find-learning-rate", "find-batch-size"])
def test_images_to_test_with_alone_are_refused_before_a_word_of_training(
    command: str, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = fit_arguments(images, tmp_path / "run", "--data.test_fraction", "1")
    assert main([command, *arguments[1:]]) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert error.startswith("error: --data: all images are of the test split") and error.count("\n") == 1


@pytest.mark.parametrize(("message", "line"), [("\n first\nsecond", "first"), ("\n", "ValueError"), ("", "ValueError")])
def test_an_error_is_one_line_with_words(message: str, line: str) -> None:
    assert one_line(ValueError(message)) == line


def test_a_report_of_some_test_batches(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With patients, from which its intervals are."""
    table = write_table(tmp_path / "table.csv", make_patients(tmp_path))
    options = ["--data.group_column", "patient", "--trainer.max_epochs", "1", "--report", "true"]
    assert fit(table, tmp_path / "run", *options, "--trainer.limit_test_batches", "1") == 0
    evaluation = json.loads((tmp_path / "run" / "metrics.json").read_text())["evaluation"]
    assert (evaluation["images"], evaluation["grouped"]) == (4, True)
    capsys.readouterr()
    again = ["test", "--config", str(tmp_path / "run" / "config.yaml"), "--ckpt_path", "best"]
    assert "limit_test_batches leaves no image" in fails([*again, "--trainer.limit_test_batches", "0"], capsys)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--seed_everything", "-1"], "--seed_everything: expected a number of 0 to 4294967295, got -1"),
        (["--trainer.accumulate_grad_batches", "0"], "accumulate_grad_batches: expected a number above 0, got 0"),
        (["--trainer.check_val_every_n_epoch", "0"], "check_val_every_n_epoch: expected a number above 0, got 0"),
        (["--data.seed", "3"], "--data.seed: a run has one seed for all, --seed_everything; give that"),
        (["--data.init_args.seed=3"], "--data.seed: a run has one seed for all, --seed_everything; give that"),
        (["--ema_decay", "1"], "--ema_decay: expected a number above 0 and below 1, got 1"),
        (["--trainer.overfit_batches", "1"], "--trainer.overfit_batches: not here; give a smaller table or folder"),
    ],
)
def test_options_of_lightning_that_are_refused(
    option: list[str], message: str, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in fails(fit_arguments(images, tmp_path / "run", *option), capsys)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v2.RandomRotate", "--data.augmentation torchvision.transforms.v2.RandomRotate: there is no such class"),
        (
            "RandomRotation",
            "--data.augmentation torchvision.transforms.RandomRotation: expected a subclass of Transform",
        ),
    ],
)
def test_a_class_of_augmentations_that_is_none(
    name: str, message: str, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = json.dumps([{"class_path": f"torchvision.transforms.{name}", "init_args": {"degrees": 15}}])
    assert message in fails(fit_arguments(images, tmp_path / "run", "--data.augmentation", steps), capsys)


@pytest.mark.parametrize("size", ["x", "0", "-3", "2.5"])
def test_a_size_that_is_no_whole_number(size: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["visualize", "reuse", "--model", "densenet121", f"--image_size={size}", "--output", "reuse.png"])
    assert f"--image_size: expected a whole number of at least 1, got {size};" in capsys.readouterr().err


def test_a_reader_that_has_seen_enough_ends_a_command_without_a_word() -> None:
    code = """
import sys
from densenet_efficient import cli
def read_on(options):
    for number in range(100_000):
        print(number)
cli.run_summary = read_on
sys.exit(cli.main(["summary", "densenet121", "--input", "1x3x32x32"]))
"""
    command = [sys.executable, "-c", code]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.readline() == b"0\n"
    process.stdout.close()
    said = process.stderr.read()
    process.stderr.close()
    assert (process.wait(), said) == (141, b"")


def test_a_broken_pipe_of_another_kind_is_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def break_pipe(options: object) -> None:
        raise BrokenPipeError("a worker is gone")

    monkeypatch.setattr(command_line, "run_summary", break_pipe)
    assert main(["summary", "densenet121", "--input", "1x3x32x32"]) == 2
    assert capsys.readouterr().err == "error: a worker is gone\n"
