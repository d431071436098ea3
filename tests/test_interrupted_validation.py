"""Runs that are told to stop while they validate: at once, with a state from which they end with the same bits."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pytorch_lightning import Trainer
from training_cases import assert_same_bits, fit, make_images, weights

from densenet_efficient.training.checkpoint import read_checkpoint
from densenet_efficient.training.finish import CollectOutputs
from densenet_efficient.training.history import History

pytestmark = pytest.mark.own_process
THREE_BATCHES = ("--data.validation_fraction", "0.5")  # in each epoch of two, and in each validation
AVERAGED = ("--ema_decay", "0.9")
TWICE_AN_EPOCH = ("--trainer.val_check_interval", "2", "--trainer.check_val_every_n_epoch", "null")
TWO_EPOCHS = ("--trainer.max_epochs", "2")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"), per_class=12)


def validating(patch: pytest.MonkeyPatch, steps: int, batch: int, act: Callable[[], Any]) -> list[int]:
    """Act after the validation batch of this index that comes after so many steps; return the batches of then."""
    seen: list[int] = []

    def on_validation_batch_end(self: History, trainer: Trainer, *given: Any) -> None:
        if trainer.global_step == steps:
            seen.append(given[3])
            if given[3] == batch:
                act()

    patch.setattr(History, "on_validation_batch_end", on_validation_batch_end, raising=False)
    return seen


def records(run: Path) -> list[dict[str, float]]:
    found: list[dict[str, float]] = read_checkpoint(run / "last.ckpt")["callbacks"]["History"]["records"]
    return found


@pytest.mark.parametrize(
    ("number", "steps", "options"),
    [
        (signal.SIGTERM, 3, AVERAGED),
        (signal.SIGINT, 6, (*AVERAGED, "--trainer.enable_progress_bar", "true")),
        (signal.SIGTERM, 3, ("--model.head_epochs", "1", "--monitor", "train_loss", "--patience", "5")),
        (signal.SIGTERM, 4, TWICE_AN_EPOCH),
        (signal.SIGTERM, 2, ("--trainer.accumulate_grad_batches", "2")),
    ],
)
def test_a_validation_is_left_and_done_again(
    number: signal.Signals,
    steps: int,
    options: tuple[str, ...],
    images: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The best checkpoint and the figures of each epoch are those of the run never stopped, too."""
    given = (*THREE_BATCHES, *TWO_EPOCHS, *options)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert fit(images, whole, *given) == 0
    with pytest.MonkeyPatch.context() as patch:
        seen = validating(patch, steps, 0, lambda: signal.raise_signal(number))
        assert fit(images, stopped, *given) == 128 + number
        assert seen == [0]
    kept = stopped / "last.ckpt"
    said = f"Interrupted in a validation, which is done again; continue from {kept} with --ckpt_path last"
    assert capsys.readouterr().err.splitlines()[-1] == said
    assert read_checkpoint(kept)["global_step"] == steps
    with pytest.MonkeyPatch.context() as patch:
        seen = validating(patch, steps, 2, lambda: None)
        assert fit(images, stopped, *given, "--ckpt_path", "last") == 0
        assert seen == [0, 1, 2]
    for name in ("last.ckpt", "best.ckpt"):
        assert_same_bits(weights(stopped, name), weights(whole, name))
    if options == TWICE_AN_EPOCH:  # whose training goes on after the validation: its figures are then of the rest
        assert [record["val_loss"] for record in records(stopped)] == [record["val_loss"] for record in records(whole)]
    else:
        assert records(stopped) == records(whole)


@pytest.mark.parametrize(
    ("batch", "options"),
    [(2, TWO_EPOCHS), (0, ("--trainer.max_epochs", "9", "--trainer.max_steps", "3"))],
)
def test_an_epoch_that_is_nearly_over_is_ended(
    batch: int, options: tuple[str, ...], images: Path, tmp_path: Path
) -> None:
    """After the last batch, and where no training follows with which the validation would be done again."""
    with pytest.MonkeyPatch.context() as patch:
        seen = validating(patch, 3, batch, lambda: signal.raise_signal(signal.SIGTERM))
        assert fit(images, tmp_path, *THREE_BATCHES, *options) == 128 + signal.SIGTERM
        assert seen == [0, 1, 2]
    assert (tmp_path / "best.ckpt").exists()
    assert len(records(tmp_path)) == 1


def test_a_signal_before_the_training_saves_nothing(images: Path, tmp_path: Path) -> None:
    """In the validation that only tries whether there will be one."""
    with pytest.MonkeyPatch.context() as patch:
        validating(patch, 0, 0, lambda: signal.raise_signal(signal.SIGTERM))
        assert fit(images, tmp_path, *THREE_BATCHES) == 128 + signal.SIGTERM
    assert not list(tmp_path.glob("*.ckpt"))


def test_a_signal_before_the_first_step_names_no_checkpoint(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(History, "on_train_epoch_start", lambda *_: signal.raise_signal(signal.SIGTERM))
    assert fit(images, tmp_path) == 128 + signal.SIGTERM
    assert capsys.readouterr().err == "Interrupted before the first step; the same command begins again\n"
    assert not list(tmp_path.glob("*.ckpt"))


@pytest.fixture
def heeding_ctrl_c() -> Iterator[None]:
    """As in a terminal: what a shell starts in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeding_ctrl_c")
def test_ctrl_c_in_the_evaluation_says_so(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where the training is over; the same command then writes its report."""
    monkeypatch.setattr(CollectOutputs, "on_test_batch_end", lambda *_: signal.raise_signal(signal.SIGINT))
    assert fit(images, tmp_path, "--trainer.max_epochs", "1", "--report", "true") == 128 + signal.SIGINT
    assert capsys.readouterr().err.splitlines()[-1] == "Interrupted"
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
