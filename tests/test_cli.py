"""The commands, as a person runs them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from densenet_efficient.cli import main
from densenet_efficient.training.checkpoint import load_checkpoint

TRAIN = ["train", "--data", "digits", "--output"]
FILES = ["checkpoint.pt", "curves.png", "memory.png", "metrics.json"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of one epoch, in a directory that holds an earlier run and another file."""
    output = tmp_path_factory.mktemp("runs") / "demo"
    output.mkdir()
    (output / "metrics.json").write_text("earlier")
    (output / "notes.txt").write_text("mine")
    assert main([*TRAIN, str(output), "--epochs", "1", "--memory-depths", "10"]) == 0
    return output


def fails(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of the error."""
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert err.count("\n") == 1
    assert "Traceback" not in out + err
    return err


@pytest.mark.parametrize("command", [[], ["train"], ["predict"], ["summary"]])
def test_help(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_status:
        main([*command, "--help"])
    assert exit_status.value.code == 0
    assert "usage: densenet-efficient" in capsys.readouterr().out


def test_help_does_not_wait_for_what_training_imports() -> None:
    code = "import sys; from densenet_efficient import cli; cli.build_parser(); print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "densenet_efficient.cli" in modules.split()
    assert not {"torchvision", "sklearn", "matplotlib", "rich"} & set(modules.split())


def test_train_leaves_its_four_files(run: Path) -> None:
    assert sorted(path.name for path in run.iterdir()) == sorted([*FILES, "notes.txt"])
    for name in ("curves.png", "memory.png"):
        with Image.open(run / name) as image:
            assert image.format == "PNG"


def test_metrics_compare_naive_and_efficient(run: Path) -> None:
    metrics = json.loads((run / "metrics.json").read_text())
    comparison = metrics["comparison"]
    assert comparison["accuracy"]["naive"] == comparison["accuracy"]["efficient"]
    assert comparison["accuracy"]["efficient"] == metrics["history"][-1]["held_out_accuracy"]
    for cost in ("step_ms", "mib_per_image"):
        assert list(comparison[cost]) == ["naive", "efficient"]
        assert min(comparison[cost].values()) > 0
    assert list(metrics["mib_per_image_at_depth"]) == ["10"]
    assert metrics["versions"]["torch"] == torch.__version__.split("+")[0]


def test_predict_classifies_an_image_file(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    digits = load_digits()
    image = Image.fromarray((digits.images[0] * (255 / 16)).astype("uint8")).resize((80, 80))
    image.convert("RGB").save(tmp_path / "zero.png")
    assert main(["predict", "--checkpoint", str(run / "checkpoint.pt"), str(tmp_path / "zero.png")]) == 0
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{tmp_path / 'zero.png'}: ")
    assert "top 3: " in line


def test_interrupt_leaves_a_checkpoint_that_loads(tmp_path: Path) -> None:
    output = tmp_path / "run"
    command = [sys.executable, "-m", "densenet_efficient.cli", *TRAIN, str(output), "--epochs", "1000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("Training ")
    time.sleep(0.5)
    os.kill(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.splitlines()[-1] == f"Interrupted; the weights so far are in {output / 'checkpoint.pt'}"
    assert "Traceback" not in err
    assert [path.name for path in output.iterdir()] == ["checkpoint.pt"]
    assert load_checkpoint(output / "checkpoint.pt").class_names == list("0123456789")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nowhere"], "nowhere: no such folder"),
        (["--model", "densenet-1"], "densenet-bc-100-12"),
        (["--device", "toaster"], "toaster"),
        (["--batch-size", "5000"], "one batch of 5000 images"),
        (["--memory-depths", "23"], "depth"),
    ],
)
def test_train_refuses_before_it_writes(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in fails([*TRAIN, str(tmp_path / "run"), *arguments], capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["--epochs", "0"],
        ["--batch-size", "1"],
        ["--learning-rate", "nan"],
        ["--checkpointing", "everything"],
        ["--threads", "-1"],
    ],
)
def test_train_refuses_values_out_of_range(arguments: list[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as exit_status:
        main([*TRAIN, str(tmp_path / "run"), *arguments])
    assert exit_status.value.code == 2
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_stops_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*TRAIN, str(tmp_path / "run"), "--learning-rate", "1e38"]
    assert "the training loss became nan" in fails(arguments, capsys)
    assert not any((tmp_path / "run").iterdir())


def test_output_that_is_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("mine")
    for output in (tmp_path / "file", tmp_path / "file" / "run"):
        assert f"cannot write into {output}" in fails([*TRAIN, str(output)], capsys)
    assert (tmp_path / "file").read_text() == "mine"


def test_predict_without_its_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    error = fails(["predict", "--checkpoint", str(tmp_path / "none.pt"), "image.png"], capsys)
    assert f"{tmp_path / 'none.pt'}: No such file" in error


class Malicious:
    def __reduce__(self) -> tuple[object, ...]:
        return os.system, ("exit 1",)


def damage(path: Path, how: str) -> None:
    content = torch.load(path, weights_only=True)
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:5000])
    elif how == "more than tensors and plain values":
        torch.save({**content, "class_names": Malicious()}, path)
    elif how == "another architecture":
        torch.save({**content, "config": {**content["config"], "growth_rate": 13}}, path)
    else:
        torch.save(content["state_dict"], path)


@pytest.mark.parametrize(
    "how",
    ["truncated", "more than tensors and plain values", "another architecture", "not a checkpoint of densenet"],
)
def test_predict_with_a_bad_checkpoint(run: Path, how: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(shutil.copy(run / "checkpoint.pt", tmp_path))
    damage(path, how)
    error = fails(["predict", "--checkpoint", str(path), "image.png"], capsys)
    assert f"error: {path}: " in error
    assert how in error


def test_predict_without_its_image(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    error = fails(["predict", "--checkpoint", str(run / "checkpoint.pt"), "none.png"], capsys)
    assert "none.png: No such file" in error


@pytest.mark.parametrize("kept", [0, 20, 60])
def test_predict_with_a_damaged_image(run: Path, kept: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("L", (64, 64), 7).save(tmp_path / "whole.png")
    (tmp_path / "damaged.png").write_bytes((tmp_path / "whole.png").read_bytes()[:kept])
    images = [str(tmp_path / "whole.png"), str(tmp_path / "damaged.png")]
    error = fails(["predict", "--checkpoint", str(run / "checkpoint.pt"), *images], capsys)
    assert f"{tmp_path / 'damaged.png'}: expected an image file" in error


def test_predict_with_a_text_for_an_image(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.png").write_text("no image")
    error = fails(["predict", "--checkpoint", str(run / "checkpoint.pt"), str(tmp_path / "text.png")], capsys)
    assert "expected an image file" in error


@pytest.mark.parametrize("shape", ["4x3x224", "4,3,224,224", "4x3x0x224"])
def test_summary_refuses_a_malformed_input(shape: str) -> None:
    with pytest.raises(SystemExit) as exit_status:
        main(["summary", "densenet201", "--input", shape])
    assert exit_status.value.code == 2
