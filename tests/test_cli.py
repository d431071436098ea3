"""The commands, as a person runs them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from cases import needs_native
from PIL import Image
from sklearn.datasets import load_digits
from training_cases import fails, fit, fit_arguments, make_cifar, make_images

from densenet_efficient import __version__, summary_table
from densenet_efficient.cli import CONFIGURED_COMMANDS, main, with_underscores
from densenet_efficient.models import create_model, model_names
from densenet_efficient.training import finish
from densenet_efficient.training.checkpoint import load_classifier, read_checkpoint
from densenet_efficient.training.recipes import FOLDER, recipe_names
from densenet_efficient.training.shorthands import FORMS_OF_DATA

DEMO = ["fit", "--config", "demo", "--trainer.max_epochs", "1", "--output"]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo, shortened to one epoch, in a directory that holds an earlier run and another file."""
    output = tmp_path_factory.mktemp("runs") / "demo"
    output.mkdir()
    (output / "last.ckpt").write_text("earlier")
    (output / "notes.txt").write_text("mine")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finish, "MEMORY_DEPTHS", (10,))
        assert main([*DEMO, str(output)]) == 0
    return output


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"))


@pytest.mark.parametrize("command", [[], *([name] for name in CONFIGURED_COMMANDS), ["summary"], ["plan"], ["doctor"]])
def test_help(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_status:
        main([*command, "--help"])
    assert exit_status.value.code == 0
    assert "usage: densenet-efficient" in capsys.readouterr().out


KINDS_OF_DATA = ("FolderData", "CSVData", "DigitsData", "CIFARData", "SVHNData", "MedMNISTData")


@pytest.mark.parametrize(
    "arguments",
    [
        *([command, "--help"] for command in CONFIGURED_COMMANDS),
        *(["fit", f"--data.help={kind}"] for kind in KINDS_OF_DATA),
    ],
    ids=" ".join,
)
def test_every_option_is_explained(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    out = re.sub(r"\nLinked arguments:.*?(?=\noptions of|\Z)", "", capsys.readouterr().out, flags=re.DOTALL)
    paragraphs = re.split(r"\n  (?=-)", out)[1:]
    names = {paragraph.split()[0] for paragraph in paragraphs}
    assert names & {"--data.batch_size", "--checkpoint"}
    assert ("options of --data FOLDER:" in out) is ("--help" in arguments and "predict" not in arguments)
    for paragraph in paragraphs:
        first, *others = paragraph.splitlines()
        described = first.partition("  ")[2] + " ".join(line for line in others if line.startswith(" " * 20))
        assert len(re.split(r"\((required, )?type:", described)[0].split()) > 1, paragraph


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"densenet-efficient {__version__}\n"


def test_help_names_the_recipes_and_what_may_augment(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["fit", "--help"], ["fit", "--data.help=FolderData"]):
        with pytest.raises(SystemExit):
            main(arguments)
    out = capsys.readouterr().out
    for name in recipe_names():
        assert f"\n  {name} " in out
    explained = " ".join(out.split()).partition(f"{FORMS_OF_DATA}; or a class. --data.help KIND")[2]
    assert all(kind in explained.partition("known subclasses")[0] for kind in KINDS_OF_DATA)
    assert "torchvision.transforms.v2.RandomRotation" in out and "torch.nn.Linear" not in out


def test_nothing_heavy_is_imported_before_it_is_needed() -> None:
    code = """
import sys, densenet_efficient
from densenet_efficient import cli
cli.build_parser()
print(*sys.modules)
"""
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "densenet_efficient.cli" in modules.split()
    heavy = {"torchvision", "sklearn", "matplotlib", "rich", "pytorch_lightning", "torchmetrics", "jsonargparse"}
    assert not heavy & set(modules.split())


@needs_native
def test_the_compiler_is_not_imported_for_an_inference_or_a_summary() -> None:
    """It takes as long to import as torch itself."""
    code = """
import sys, torch, densenet_efficient
from densenet_efficient import cli
model = densenet_efficient.EfficientDenseNet121().eval()
with torch.inference_mode():
    model(torch.zeros(1, 3, 64, 64))
cli.main(["summary", "densenet121", "--input", "1x3x64x64"])
print("torch._dynamo" in sys.modules)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split()[-1] == "False"


def test_summary_prints_the_layers(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["summary", "densenet121", "--input", "1x3x64x64"]) == 0
    assert "denseblock4" in capsys.readouterr().out


# ---- the demo ----


def test_the_demo_leaves_its_files(demo: Path) -> None:
    files = {"best.ckpt", "last.ckpt", "metrics.json", "curves.png", "memory.png", "report.html", "config.yaml"}
    assert files | {"notes.txt"} <= {path.name for path in demo.iterdir()}
    with Image.open(demo / "memory.png") as image:
        assert image.format == "PNG"


def test_its_metrics_compare_naive_and_efficient(demo: Path) -> None:
    metrics = json.loads((demo / "metrics.json").read_text())
    comparison = metrics["comparison"]
    assert comparison["accuracy"]["naive"] == comparison["accuracy"]["efficient"]
    assert comparison["accuracy"]["efficient"] == pytest.approx(metrics["history"][-1]["val_accuracy"])
    for cost in ("step_ms", "mib_per_image"):
        assert list(comparison[cost]) == ["naive", "efficient"]
        assert min(comparison[cost].values()) > 0
    assert list(metrics["mib_per_image_at_depth"]) == ["10"]
    assert metrics["versions"]["torch"] == torch.__version__.split("+")[0]


def test_predict_classifies_an_image_file(demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    digits = load_digits()
    image = Image.fromarray((digits.images[0] * (255 / 16)).astype("uint8")).resize((80, 80))
    image.convert("RGB").save(tmp_path / "zero.png")
    assert main(["predict", "--checkpoint", str(demo / "best.ckpt"), str(tmp_path / "zero.png")]) == 0
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{tmp_path / 'zero.png'}: ")
    assert "top 3: " in line


# ---- runs ----


def test_a_run_is_tested_from_its_own_configuration(images: Path, tmp_path: Path) -> None:
    assert fit(images, tmp_path / "run", "--trainer.max_epochs", "1", "--report", "true") == 0
    before = (tmp_path / "run" / "metrics.json").read_bytes()
    config = ["--config", str(tmp_path / "run" / "config.yaml"), "--ckpt_path", "best"]
    assert main(["test", *config]) == 0
    tested = json.loads((tmp_path / "run" / "test" / "metrics.json").read_text())
    assert tested["evaluation"] == json.loads(before)["evaluation"]
    assert (tmp_path / "run" / "metrics.json").read_bytes() == before
    assert main(["validate", *config]) == 0
    logs = {path.name.partition(".")[0] for path in (tmp_path / "run" / "logs").rglob("*") if path.is_file()}
    assert {"metrics", "events"} <= logs


def test_the_weights_to_start_from_are_not_needed_again(images: Path, tmp_path: Path) -> None:
    run, start = tmp_path / "run", tmp_path / "start.pth"
    torch.save(create_model("densenet-bc-40-12", num_classes=2).state_dict(), start)
    assert fit(images, run, "--model.weights", str(start), "--trainer.max_epochs", "1") == 0
    start.unlink()
    assert main(["test", "--config", str(run / "config.yaml"), "--ckpt_path", "best"]) == 0
    assert str(start) in (run / "test" / "report.html").read_text()


@pytest.mark.usefixtures("one_thread")
def test_a_run_takes_the_threads_it_is_given(images: Path, tmp_path: Path) -> None:
    assert fit(images, tmp_path / "run", "--threads", "2", "--trainer.fast_dev_run", "true") == 0
    assert torch.get_num_threads() == 2


def test_what_one_sees_of_a_run(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A bar with images per second, memory and the time left, and a line per epoch."""
    shown = ("--trainer.max_epochs", "2", "--trainer.enable_progress_bar", "true")
    assert fit(images, tmp_path / "run", *shown) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "Training densenet-bc-40-12 on 10 images of 2 classes, with 2 to validate by" in out
    for epoch in (1, 2):
        assert re.search(rf"Epoch {epoch}/2: train_loss [\d.]+, .*val_auroc [\d.]+, [\d.]+ images/s", out)
    bar = re.search(r"images/s: ([\d.]+) MiB: (\d+) ETA: 0:00:00", out)
    assert bar is not None and float(bar[1]) > 0 and int(bar[2]) > 100


def test_an_earlier_run_is_not_replaced_by_accident(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "last.ckpt").write_text("mine")
    error = fails(fit_arguments(images, tmp_path), capsys)
    assert "holds an earlier run; continue it with --ckpt_path last, replace it with --overwrite true" in error
    assert (tmp_path / "last.ckpt").read_text() == "mine"


def test_interrupt_leaves_a_checkpoint_that_loads(tmp_path: Path) -> None:
    arguments = ["fit", "--config", "demo", "--trainer.max_epochs", "1000", "--output", str(tmp_path)]
    command = [sys.executable, "-m", "densenet_efficient.cli", *arguments, "--save_every_n_steps", "1"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "last.ckpt").exists():
        assert process.poll() is None
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert err.splitlines()[-1].startswith("Interrupted after a whole step; continue from ")
    assert "Traceback" not in err
    assert load_classifier(tmp_path / "last.ckpt").class_names == list("0123456789")


@pytest.mark.own_process
@pytest.mark.parametrize("workers", ["0", "1"])
def test_an_image_that_disappears_in_the_middle_of_an_epoch(
    workers: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from training_cases import stopping_at

    images = make_images(tmp_path / "images")
    for path in (images / "dark").iterdir():
        stopping_at(monkeypatch, 3, lambda trainer, path=path: [p.write_text("no") for p in path.parent.iterdir()])
    error = fails(fit_arguments(images, tmp_path / "run", "--data.num_workers", workers), capsys)
    assert f"error: {images}/dark/" in error and "expected an undamaged image" in error
    assert read_checkpoint(tmp_path / "run" / "last.ckpt")["global_step"] == 2


# ---- bad input ----


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nowhere"], "nowhere: no such folder; expected a folder of images, a table ending in .csv, or one"),
        (["--data", "nowhere.csv"], "nowhere.csv: No such file"),
        (["--data", "images.txt"], "--data images.txt: no such folder; expected a folder of images, a table ending in"),
        (["--data", __file__], "test_cli.py: not such a file; expected a folder of images, a table ending in .csv, or"),
        (["--data", "mine.Data"], "--data mine.Data: there is no such class;"),
        (["--model.network", "densenet-1"], "densenet-bc-100-12"),
        (["--trainer.accelerator", "gpu"], "gpu"),
        (["--data.batch_size", "5000"], "one batch of 5000 images"),
        (["--data.batch_size", "1"], "expected at least 2, so that a batch has a variance"),
        (["--data.image_size", "0"], "--data.image_size: expected at least 1, got 0"),
        (["--data.mean", "[0.5, 0.5]"], "expected one mean per channel, 1, got 2"),
        (["--data.std", "[]"], "--data.std: expected one std per channel, 1, got 0"),
        (["--data.std", "[0]"], "--data.std: expected a number above 0, got 0"),
        (["--data.value_range", "[400, -1000]"], "--data.value_range: expected the lower number first, got 400 -1000"),
        (["--model.learning_rate", "-1"], "expected a number above 0"),
        (["--model.head_learning_rate", "-1"], "--model.head_learning_rate: expected a number above 0, got -1"),
        (
            ["--monitor", "val_auc"],
            "expected one of val_loss, val_accuracy, val_auroc",
        ),
        (["--model.checkpointing", "everything"], "'none', 'bottleneck'"),
        (["--model.netwerk", "densenet121"], "netwerk"),
        (["--config", "nothing"], "nothing: no such file, and no such recipe; the recipes are cifar10, demo"),
        (["--ckpt_path", "none.ckpt"], "none.ckpt"),
        (["--model.weights", "IMAGENET22K"], "torchvision has no weights for densenet-bc-40-12"),
        (["--model.weights", "mine.pth"], "--model.weights mine.pth: no such file; expected one, or a name such as"),
        (
            ["--model.network", "densenet121", "--data.image_size", "28"],
            "--data.image_size: densenet121 needs images of",
        ),
        (["--ema_decay", "3"], "--ema_decay: expected a number above 0 and below 1, got 3"),
        (["--model.warmup", "3"], "--model.warmup: expected a number of 0 to 1, got 3"),
        (["--model.mixup", "-1"], "--model.mixup: expected a number of at least 0, got -1"),
        (["--model.optimizer", "lion"], "--model.optimizer: expected one of 'adamw', 'adam', 'sgd', got lion;"),
        (["--data.batch_sise", "4"], "--data.batch_sise: DigitsData has no such option;"),
        (["--data.batch_size", "many"], "--data.batch_size: expected int, got many;"),
        (["--data.channels", "2"], "--data.channels: expected one of 1, 3 or null, got 2;"),
        (["--data", "MedMNISTData"], "--data.name: MedMNISTData needs it;"),
        (["--trainer.max_epochs", "two"], "--trainer.max_epochs: expected int or null, got two;"),
        (["--trainer.devices", "many"], "--trainer: `devices`"),
        (["--patience", "0"], "--patience: expected a number above 0, got 0"),
    ],
)
def test_fit_refuses_before_it_trains(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["fit", "--data", "digits", "--model.network", "densenet-bc-40-12", "--output", str(tmp_path / "run")]
    assert message in fails([*given, *arguments], capsys)
    assert not list((tmp_path / "run").glob("*.ckpt"))


@pytest.mark.parametrize("command", ["validate", "test"])
def test_what_is_evaluated_must_be_named(
    command: str, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = fails([command, *fit_arguments(images, tmp_path)[1:]], capsys)
    assert f"{command} needs --ckpt_path: a checkpoint, or best or last of --output" in error


def test_a_config_with_an_unknown_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.yaml").write_text("model: {netwerk: densenet121}\ndata: DigitsData\n")
    error = fails(["fit", "--config", str(tmp_path / "mine.yaml"), "--output", str(tmp_path / "run")], capsys)
    assert "netwerk" in error and str(tmp_path / "mine.yaml") in error and "--help lists the options" in error


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            "data: {class_path: DigitsData, init_args: {batch_sise: 4}}",
            "--data.batch_sise: DigitsData has no such option",
        ),
        ("data: {class_path: DigitData}", "--data DigitData: there is no such class"),
        ("data: DigitsData\ntrainer: {max_epoch: 3}", "--trainer.max_epoch: there is no such option"),
        ("models: {network: densenet121}", "--models.network: there is no such option"),
        ("data: [", "Problems parsing config"),
    ],
)
def test_what_a_config_says_wrong(
    config: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(config)
    error = fails(["fit", "--config", str(path), "--output", str(tmp_path / "run")], capsys)
    assert message in error and f"(in {path}, or on the command line); densenet-efficient fit --help" in error


def test_options_of_data_come_after_its_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    error = fails(["fit", "--data.batch_size", "4", "--data", "digits", "--output", str(tmp_path)], capsys)
    assert error.startswith("error: --data: name the kind first, the options of its kind after it;")


def test_options_may_be_written_with_dashes(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check-data", "--data", str(images), "--data.validation-fraction", "0.5"]) == 0
    assert "--data.validation-fraction" not in capsys.readouterr().out
    for spelling in ("--batch-size", "--batch_size"):
        error = fails(["predict", "--checkpoint", str(tmp_path / "none.ckpt"), "any.png", f"{spelling}=0"], capsys)
        assert error.startswith("error: --batch_size: expected a whole number above 0;")
    given = ["--a-b.c-d=e-f", "-1", "a-b.png", "--", "--a-b.png"]  # the last is a file
    assert with_underscores(given) == ["--a_b.c_d=e-f", *given[1:]]


def test_output_that_is_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("mine")
    for output in (tmp_path / "file", tmp_path / "file" / "run"):
        assert f"cannot write into {output}" in fails([*DEMO, str(output)], capsys)
    assert (tmp_path / "file").read_text() == "mine"


def test_predict_without_its_files(demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    error = fails(["predict", "--checkpoint", str(tmp_path / "none.ckpt"), "image.png"], capsys)
    assert f"{tmp_path / 'none.ckpt'}: No such file; expected a checkpoint written by densenet-efficient fit" in error
    required = "error: the following arguments are required:"
    assert fails(["predict", "any.png"], capsys).startswith(f"{required} --checkpoint;")
    assert fails(["predict"], capsys).startswith(f"{required} --checkpoint, INPUT;")
    predict = ["predict", "--checkpoint", str(demo / "best.ckpt")]
    assert "torch_xla" in fails([*predict, str(demo / "memory.png"), "--accelerator", "tpu"], capsys)
    error = fails([*predict, "none.png", "--bad_files", "skip"], capsys)
    assert "none.png: No such file; expected an image, a folder or a CSV table" in error
    (tmp_path / "file").write_text("mine")
    error = fails([*predict, str(demo / "memory.png"), "--output", str(tmp_path / "file" / "out.csv")], capsys)
    assert f"cannot write into {tmp_path / 'file'}" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        *(
            (["summary", "densenet201", "--input", shape], "argument --input: input")
            for shape in ("4x3x224", "4,3,224,224", "4x3x0x224")
        ),
        (
            ["plan", "densenet201", "--input", "1x3x64x64", "--dtype", "int8"],
            "argument --dtype: invalid choice",
        ),
        (["plan", "densenet201"], "the following arguments are required: --input"),
        (["visualize", "filters", "--image_size", "0"], "argument --image_size: expected a whole number of at least 1"),
        (["doctor", "--jsn", "x"], "unrecognized arguments: --jsn x"),
        (["train"], "argument COMMAND: invalid choice: 'train'"),
        ([], "the following arguments are required: COMMAND"),
    ],
)
def test_wrong_arguments_are_named_in_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_status:
        main(arguments)
    assert exit_status.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}") and error.endswith("--help lists the options\n")
    assert error.count("\n") == 1


def test_ctrl_c_ends_a_command_in_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(summary_table, "print_summary", interrupted)
    assert main(["summary", "densenet121", "--input", "1x3x64x64"]) == 130
    assert capsys.readouterr().err == "Interrupted\n"


def test_a_missing_package_of_a_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delitem(sys.modules, "densenet_efficient.summary_table")
    for module in [module for module in sys.modules if module.partition(".")[0] == "rich"]:
        monkeypatch.setitem(sys.modules, module, None)  # its import raises ModuleNotFoundError
    error = fails(["summary", "densenet121", "--input", "1x3x64x64"], capsys)
    assert error.startswith("error: import of rich") and "pip install 'densenet-efficient[train]' brings it" in error


# ---- recipes and finders ----


@pytest.mark.parametrize("name", recipe_names())
def test_recipes_are_valid(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_status:
        main(["fit", "--config", name, "--output", "runs/any", "--print_config"])
    assert exit_status.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    for section, values in yaml.safe_load((FOLDER / f"{name}.yaml").read_text()).items():
        if isinstance(values, dict) and section != "data":
            assert {key: printed[section][key] for key in values} == values
    assert printed["model"]["network"] in model_names()
    assert printed["patience"] is None or printed["monitor"] != "val_loss"  # the tutorial says so


SMALL_AND_SHORT = {
    "--model.network": "densenet-bc-40-12",
    "--model.weights": "null",
    "--data.image_size": "8",
    "--data.batch_size": "4",
    "--data.num_workers": "0",
    "--trainer.accelerator": "cpu",
    "--trainer.enable_progress_bar": "false",
}


@pytest.fixture(params=["finetune", "lung-disease", "imagenet", "mnist", "cifar10"])
def recipe_with_data(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[str, list[str]]:
    """A recipe's name, and options that give it data to train on."""
    name: str = request.param
    if name == "cifar10":
        make_cifar(tmp_path, monkeypatch)
        return name, ["--data.root", str(tmp_path), "--data.download", "false"]
    diseases = ("covid", "lung-opacity", "normal", "tuberculosis", "viral-pneumonia")
    for part in ("train", "val") if name == "imagenet" else (".",):
        make_images(tmp_path / "images" / part, 8, diseases if name == "lung-disease" else ("bright", "dark"))
    return name, ["--data", str(tmp_path / "images")]


def test_recipes_train(recipe_with_data: tuple[str, list[str]], tmp_path: Path) -> None:
    """All that a recipe says but its size: its stages, schedule, augmentation, averages, and what is best."""
    name, data = recipe_with_data
    epochs = 4 if name in ("finetune", "lung-disease") else 1  # the head alone, then everything
    options = [option for pair in SMALL_AND_SHORT.items() for option in pair] + ["--trainer.max_epochs", str(epochs)]
    assert main(["fit", "--config", name, *data, *options, "--output", str(tmp_path / "run")]) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["evaluation"]["split"] == ("test" if name in ("lung-disease", "cifar10") else "validation")
    flattered = name != "lung-disease"  # which alone has test images of its own
    assert metrics["evaluation"]["chose_epoch"] is flattered
    assert ("they flatter it a little" in (tmp_path / "run" / "report.html").read_text()) is flattered
    assert len(metrics["history"]) == epochs
    classes = load_classifier(tmp_path / "run" / "best.ckpt").class_names
    assert classes == list(metrics["evaluation"]["classes"])
    assert len(classes) == {"lung-disease": 5, "cifar10": 10}.get(name, 2)
    assert main(["validate", "--config", str(tmp_path / "run" / "config.yaml"), "--ckpt_path", "best"]) == 0


# ---- damaged files ----


def test_damaged_files_that_are_skipped_count_nowhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither in what is said of the training nor when the run is tested."""
    for part, count, damaged in (("train", 10, 5), ("val", 3, 1)):
        make_images(tmp_path / "images" / part, count)
        for index in range(damaged):
            (tmp_path / "images" / part / "dark" / f"{index}.png").write_bytes(b"")
    weighed = ("--data.bad_files", "skip", "--data.class_weights", "true", "--trainer.max_epochs", "1")
    assert fit(tmp_path / "images", tmp_path / "run", *weighed) == 0
    out = capsys.readouterr().out
    assert "on 15 images of 2 classes, with 5 to validate by" in out
    assert out.count("Skipping 6 of 26 files") == 1
    assert main(["test", "--config", str(tmp_path / "run" / "config.yaml"), "--ckpt_path", "best"]) == 0
