"""The finders of a learning rate and of a batch size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pytorch_lightning.tuner.tuning import Tuner
from training_cases import fails, fit_arguments, make_images, write_table

from densenet_efficient.cli import main
from densenet_efficient.models import create_model
from densenet_efficient.training import batch_size
from densenet_efficient.training.batch_size import (
    available_memory,
    largest_batch,
    left_in_control_groups,
    measure_training,
)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"))


def test_the_learning_rate_finder(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = fit_arguments(images, tmp_path)
    assert main(["find-learning-rate", *arguments[1:]]) == 0
    assert "--model.learning_rate " in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["learning-rate.png"]


def test_a_learning_rate_needs_more_than_a_trial_run(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = fit_arguments(images, tmp_path, "--trainer.fast_dev_run", "true")
    error = fails(["find-learning-rate", *arguments[1:]], capsys)
    assert "no learning rate stands out; train for longer, or with larger batches" in error
    assert not list(tmp_path.iterdir())


def test_a_learning_rate_is_that_of_the_whole_network(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    head_epochs = []
    monkeypatch.setattr(Tuner, "lr_find", lambda _, model, **options: head_epochs.append(model.head_epochs))
    fails(["find-learning-rate", *fit_arguments(images, tmp_path, "--model.head_epochs", "1")[1:]], capsys)
    assert head_epochs == [0]


def test_the_batch_size_finder(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command, on what a step of 10 MiB and 1 MiB per image would take besides 3 copies of the parameters."""
    asked: list[tuple[Any, ...]] = []

    def peak_memory(factory: str, config: Any, shape: Any, batch: int, **options: Any) -> int:
        asked.append((shape, batch, options))
        return (10 + batch) * 2**20

    monkeypatch.setattr(batch_size, "peak_memory", peak_memory)
    rows = [  # enough that the memory is what limits the batch
        {"path": images / name / f"{index}.png", "label": name, "split": part}
        for index, part, count in ((0, "train", 100), (1, "val", 1))
        for name in ("bright", "dark")
        for _ in range(count)
    ]
    table = write_table(tmp_path / "many.csv", rows)
    more = ("--data.split_column", "split", "--ema_decay", "0.9", "--trainer.precision", "bf16-mixed")
    arguments = fit_arguments(table, tmp_path / "run", *more)
    assert main(["find-batch-size", *arguments[1:], "--memory", str(100 / 1024)]) == 0
    network = create_model("densenet-bc-40-12", num_classes=2)
    copies = 3 * 4 * sum(parameter.numel() for parameter in network.parameters())
    batch = int(90 - copies / 2**20)
    assert f"--data.batch_size {batch}: a step takes 0.10 of 0.10 GiB on cpu" in capsys.readouterr().out
    assert {(shape, options["dtype"]) for shape, _, options in asked} == {((3, 8, 8), "bfloat16")}
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("processes", "batch"), [(1, 10), (2, 5)])
def test_a_batch_is_no_larger_than_the_training_data(
    processes: int,
    batch: int,
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Of ten images: with such a batch fit trains."""
    monkeypatch.setattr(batch_size, "peak_memory", lambda *given, **_: given[3] * 2**20)
    devices = ("--trainer.devices", str(processes))
    assert main(["find-batch-size", *fit_arguments(images, tmp_path, *devices)[1:], "--memory", "1"]) == 0
    said = capsys.readouterr().out
    assert f"--data.batch_size {batch} (there are no more images to train on): a step takes 0.01 of 1.00 GiB" in said
    assert processes > 1 or main(fit_arguments(images, tmp_path / "run", "--data.batch_size", str(batch))) == 0


def test_a_batch_size_needs_images_to_train_on(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for more, message in (
        (("--data.test_fraction", "1"), "all images are of the test split"),
        (("--trainer.devices", "6"), "expected at least 2 images to train on for each process, so that a batch has a"),
    ):
        assert message in fails(["find-batch-size", *fit_arguments(images, tmp_path, *more)[1:]], capsys)


def test_memory_of_a_container(tmp_path: Path) -> None:
    """A job within a node's slice: the slice has a limit, the job a smaller one, of which files take a part."""
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("1:cpu:/\n0::/slice/job\n")
    job = tmp_path / "sys/fs/cgroup/slice/job"
    job.mkdir(parents=True)
    for folder, limit, current in ((job, "1000", "700"), (job.parent, "5000", "800"), (job.parent.parent, "max", "9")):
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{current}\n")
        (folder / "memory.stat").write_text("anon 300\ninactive_file 400\n")
    assert list(left_in_control_groups(tmp_path)) == [700, 4600]
    assert list(left_in_control_groups(tmp_path / "elsewhere")) == []
    assert available_memory("cpu") > 2**26


def test_the_largest_batch_is_found_from_smaller_ones() -> None:
    assert largest_batch(lambda batch: 100 + 7 * batch, 1000) == (128, 996)
    steps = largest_batch(lambda batch: 100 + 7 * batch + (30 if batch > 100 else 0), 1000)
    assert steps[0] in (123, 124) and steps[1] <= 1000
    assert largest_batch(lambda batch: 100 + 7 * batch, 1000, images=50) == (50, 450)
    with pytest.raises(ValueError, match="not even 2 images fit into"):
        largest_batch(lambda batch: 100 + 7 * batch, 110)
    model = create_model("densenet-bc-40-12")
    measure = measure_training(model, (3, 8, 8), "cpu", "float32", states=2)
    assert measure(4) > 2**26


def test_two_images_are_the_least_batch() -> None:
    assert largest_batch(lambda batch: 100 + 7 * batch, 114) == (2, 114)


def test_the_memory_of_a_container_is_all_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_size, "left_in_control_groups", lambda: iter([700, 4600]))
    assert available_memory("cpu") == 700
