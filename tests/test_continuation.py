"""Runs that are continued elsewhere, after they had stopped early, with other options, or from another run."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from training_cases import assert_same_bits, fails, fit, fit_arguments, make_images, stopping_at, weights

from densenet_efficient.cli import main
from densenet_efficient.training.checkpoint import check_fits, read_checkpoint
from densenet_efficient.training.classifier import Classifier
from densenet_efficient.training.continuation import is_own_checkpoint
from densenet_efficient.training.parameter_groups import options_of

LAST = ("--ckpt_path", "last")
ONE_EPOCH = ("--trainer.max_epochs", "1")
STOPS = ("--patience", "1", "--monitor", "val_accuracy", "--model.learning_rate", "1e-9", "--trainer.max_epochs", "9")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def once(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one epoch."""
    output = tmp_path_factory.mktemp("runs") / "once"
    assert fit(images, output, *ONE_EPOCH) == 0
    return output


def with_unbeatable_best(run: Path) -> bytes:
    """Let the last checkpoint remember a best one that no epoch can surpass; return that one's bytes."""
    content = read_checkpoint(run / "last.ckpt")
    state = next(state for key, state in content["callbacks"].items() if key.startswith("ModelCheckpoint"))
    state["best_k_models"] = {path: torch.tensor(-1.0) for path in state["best_k_models"]}
    state["best_model_score"] = state["kth_value"] = torch.tensor(-1.0)
    torch.save(content, run / "last.ckpt")
    return (run / "best.ckpt").read_bytes()


def state_of(run: Path, callback: str, name: str = "last.ckpt") -> dict[str, Any]:
    states: dict[str, dict[str, Any]] = read_checkpoint(run / name)["callbacks"]
    return next(state for key, state in states.items() if key.startswith(callback))


# ---- the best checkpoint ----


@pytest.mark.parametrize("move", [shutil.move, shutil.copytree])
def test_a_run_that_was_moved_keeps_its_better_best_checkpoint(
    move: Any, images: Path, once: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(once, tmp_path / "run"))
    best = with_unbeatable_best(run)
    moved = Path(move(run, tmp_path / "moved"))
    assert fit(images, moved, *LAST, "--trainer.max_epochs", "2") == 0
    assert (
        read_checkpoint(moved / "last.ckpt")["global_step"] == 2 * read_checkpoint(moved / "best.ckpt")["global_step"]
    )
    assert (moved / "best.ckpt").read_bytes() == best
    state = state_of(moved, "ModelCheckpoint")
    assert state["best_k_models"] == {str(moved / "best.ckpt"): torch.tensor(-1.0)}
    assert (state["dirpath"], state["best_model_path"]) == (str(moved), str(moved / "best.ckpt"))
    assert state["last_model_path"] == str(moved / "last.ckpt")


def test_a_run_that_was_moved_without_its_best_checkpoint_finds_another(
    images: Path, once: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(once, tmp_path / "moved"))
    with_unbeatable_best(run)
    (run / "best.ckpt").unlink()
    assert fit(images, run, *LAST, "--trainer.max_epochs", "2") == 0
    assert (run / "best.ckpt").exists()


def test_the_best_checkpoint_of_a_run_to_be_replaced_is_not_that_of_the_run_continued(
    images: Path, once: Path, tmp_path: Path
) -> None:
    run, other = (Path(shutil.copytree(once, tmp_path / name)) for name in ("run", "other"))
    best = with_unbeatable_best(run)
    continued = ("--ckpt_path", str(run / "last.ckpt"), "--overwrite", "true", "--trainer.max_epochs", "2")
    assert fit(images, other, *continued) == 0
    assert (other / "best.ckpt").read_bytes() != best
    assert (run / "best.ckpt").read_bytes() == best


def test_the_last_checkpoint_is_that_of_the_last_epoch(images: Path, once: Path, tmp_path: Path) -> None:
    """Also of one that was not the best."""
    run = Path(shutil.copytree(once, tmp_path / "run"))
    best = with_unbeatable_best(run)
    assert fit(images, run, *LAST, "--trainer.max_epochs", "3") == 0
    assert len(state_of(run, "History")["records"]) == 3
    assert (run / "best.ckpt").read_bytes() == best
    assert len(state_of(run, "History", "previous.ckpt")["records"]) == 2


# ---- a run that had stopped early ----


@pytest.fixture(scope="module")
def stopped(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that stopped early, after two epochs of nine."""
    output = tmp_path_factory.mktemp("runs") / "stopped"
    assert fit(images, output, *STOPS) == 0
    assert len(state_of(output, "History")["records"]) == 2
    return output


@pytest.mark.parametrize("averaged", [(), ("--ema_decay", "0.9")])
def test_a_run_that_stopped_early_trains_no_more(
    averaged: tuple[str, ...],
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It still reports, as it would have done if it had not been killed then."""
    assert fit(images, tmp_path, *STOPS, *averaged) == 0
    before = (tmp_path / "last.ckpt").read_bytes()

    def no_step(*_: Any) -> None:
        raise AssertionError("another step")

    monkeypatch.setattr(Classifier, "training_step", no_step)
    for _ in range(2):
        (tmp_path / "report.html").unlink(missing_ok=True)
        assert fit(images, tmp_path, *STOPS, *averaged, *LAST, "--report", "true") == 0
        assert (tmp_path / "last.ckpt").read_bytes() == before
        assert (tmp_path / "report.html").exists()
    assert "this training had stopped early, after 1 epochs without a better val_accuracy" in capsys.readouterr().out


def test_with_more_patience_it_goes_on(images: Path, stopped: Path, tmp_path: Path) -> None:
    """And ends with the bits of a run that had that patience from the start."""
    patient = (*STOPS, "--patience", "3")
    run = Path(shutil.copytree(stopped, tmp_path / "run"))
    assert fit(images, run, *patient, *LAST) == 0
    assert fit(images, tmp_path / "whole", *patient) == 0
    assert len(state_of(run, "History")["records"]) == 4
    assert state_of(run, "EarlyStopping")["patience"] == 3
    assert_same_bits(weights(run), weights(tmp_path / "whole"))


def test_a_run_that_stopped_for_want_of_a_finite_value_trains_no_more(
    images: Path, once: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def spoil(self: Classifier, *_: Any) -> None:
        self.log("val_loss", torch.tensor(float("nan")))

    run, options = tmp_path / "run", ("--patience", "5")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Classifier, "validation_step", spoil)
        patch.setattr(Classifier, "_log_metrics", lambda *_: None)
        assert fit(images, run, *options) == 0
    before = (run / "last.ckpt").read_bytes()
    assert fit(images, run, *options, *LAST) == 0
    assert "this training had stopped early, since val_loss was not finite" in capsys.readouterr().out
    assert (run / "last.ckpt").read_bytes() == before


# ---- other options ----


@pytest.mark.parametrize(
    ("option", "given", "theirs"),
    [
        ("learning_rate", "0.0005", "0.001"),
        ("weight_decay", "0.05001", "0.05"),
        ("layer_decay", "0.7", "1"),
        ("decay_norms", "true", "false"),
    ],
)
def test_options_that_the_checkpoint_would_override_are_refused(
    option: str, given: str, theirs: str, images: Path, once: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The remedy that is named works."""
    last, before = once / "last.ckpt", (once / "last.ckpt").read_bytes()
    continued = fit_arguments(images, once, *LAST, "--trainer.max_epochs", "2", f"--model.{option}", given)
    assert main(continued) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"{last}: a checkpoint of --model.{option} {theirs}, which cannot go on with {given}; give {theirs}" in error
    assert f"start another --output from its weights alone with --model.weights {last}" in error
    assert last.read_bytes() == before
    new = ("--model.weights", str(last), f"--model.{option}", given)
    assert option != "learning_rate" or fit(images, tmp_path / "new", *ONE_EPOCH, *new) == 0


@pytest.mark.parametrize(
    "options",
    [
        ("--model.layer_decay", "0.7", "--model.learning_rate", "0.0003", "--model.head_epochs", "1"),
        ("--model.optimizer", "sgd", "--model.decay_norms", "true", "--model.momentum", "0.8"),
    ],
)
def test_the_same_options_go_on(
    options: tuple[str, ...], images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the stage of the head alone too, whose weight decay is none."""
    assert fit(images, tmp_path, *options, *ONE_EPOCH) == 0
    assert fit(images, tmp_path, *options, *LAST, "--trainer.max_epochs", "2") == 0
    assert len(state_of(tmp_path, "History")["records"]) == 2
    if "sgd" in options:
        assert fit(images, tmp_path, *options, *LAST, "--model.momentum", "0.9") == 2
        assert "--model.momentum 0.8, which cannot go on with 0.9" in capsys.readouterr().err


def test_a_loss_of_nan_names_a_remedy_that_works(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def spoil(trainer: Any) -> None:
        with torch.no_grad():
            trainer.lightning_module.model.classifier.bias.fill_(float("nan"))

    stopping_at(monkeypatch, 4, spoil)  # in the second epoch of three batches
    error = fails(fit_arguments(images, tmp_path / "run"), capsys)
    start = ("--model.weights", str(tmp_path / "run" / "best.ckpt"))
    remedy = "lower --model.learning_rate in a new run, into another --output, which may start from the best weights so"
    assert f"the training loss became nan; {remedy} far with {' '.join(start)}" in error
    monkeypatch.undo()
    assert fit(images, tmp_path / "new", *start, *ONE_EPOCH, "--model.learning_rate", "1e-4") == 0


# ---- the run that --output holds ----


def test_a_checkpoint_of_another_run_does_not_replace_this_one(
    images: Path, once: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(once, tmp_path / "run"))
    before = (run / "last.ckpt").read_bytes()
    given = ("--ckpt_path", str(once / "last.ckpt"), "--trainer.max_epochs", "2")
    error = fails(fit_arguments(images, run, *given), capsys)
    assert f"{run} holds an earlier run; continue it with --ckpt_path last, replace it with --overwrite true" in error
    assert (run / "last.ckpt").read_bytes() == before
    assert fit(images, run, "--ckpt_path", str(run / "last.ckpt"), "--trainer.max_epochs", "2") == 0


def test_which_checkpoints_are_of_the_run_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("run")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.ckpt").symlink_to(tmp_path / "elsewhere.ckpt")
    own = ("last", "best", "run/last.ckpt", tmp_path / "run" / "mine.ckpt", "link/last.ckpt", "run/kept/epoch.ckpt")
    assert all(is_own_checkpoint(given, "run") for given in own)
    assert not any(
        is_own_checkpoint(given, "run") for given in (None, "last.ckpt", "running/last.ckpt", "run/../x.ckpt")
    )


def test_groups_without_names_tell_only_their_optimizer() -> None:
    """As those of another program, or of an earlier version, which go on as they did."""
    layer = torch.nn.Linear(2, 2)
    assert options_of(torch.optim.SGD(layer.parameters(), 0.1).param_groups) == {"optimizer": "sgd"}
    assert options_of(torch.optim.Adam(layer.parameters(), 0.1).param_groups) == {"optimizer": "adam"}
    for names in (["stage 0", "head"], ["stage 0", "stage 1"]):  # without a schedule's rates; without a head
        groups = [{"name": name, "params": [torch.nn.Parameter(torch.zeros(2))]} for name in names]
        assert options_of(torch.optim.AdamW(groups, 0.1).param_groups) == {"optimizer": "adamw"}


def test_a_configuration_says_nothing_of_the_call_that_wrote_it(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert fit(images, run, "--overwrite", "true", "--trainer.max_epochs", "1") == 0
    assert "holds an earlier run" in fails(["fit", "--config", str(run / "config.yaml")], capsys)
    assert fit(images, run, "--ckpt_path", "last", "--trainer.max_epochs", "2") == 0
    assert "--ckpt_path" in fails(["test", "--config", str(run / "config.yaml")], capsys)


def test_the_same_classes_in_another_order_are_others() -> None:
    """Each would be taken for the other."""
    ours: Any = SimpleNamespace(class_names=["ill", "healthy"])
    with pytest.raises(
        ValueError, match=r"last.ckpt: a checkpoint of another class list than the data \(another order\)"
    ):
        check_fits("last.ckpt", {"class_names": ["healthy", "ill"]}, ours)
