"""What signals do to a run, and what a run keeps for the day on which one comes."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pytorch_lightning import LightningModule
from pytorch_lightning.callbacks import EMAWeightAveraging
from torch import nn
from torch.utils.data import DataLoader

from densenet_efficient.training.averaging import AveragedWeights
from densenet_efficient.training.checkpoint import last_whole
from densenet_efficient.training.interruption import SaveLast
from densenet_efficient.training.loading import ReadingLoader
from densenet_efficient.training.signals import SIGNALS


@pytest.fixture
def events() -> Iterator[list[str]]:
    """Where SIGTERM is told."""
    found: list[str] = []
    before = signal.signal(signal.SIGTERM, lambda *_: found.append("told"))
    yield found
    signal.signal(signal.SIGTERM, before)


@pytest.mark.own_process
def test_a_signal_waits_until_processes_that_read_have_begun(
    events: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def begin(self: Any) -> Iterator[int]:
        signal.raise_signal(signal.SIGTERM)
        events.append("begun")
        return iter([1])

    monkeypatch.setattr(DataLoader, "_get_iterator", begin)
    assert list(ReadingLoader([1])) == [1]
    assert events == ["begun", "told"]
    signal.raise_signal(signal.SIGTERM)  # later ones act at once again
    assert events == ["begun", "told", "told"]


def test_images_are_read_in_a_thread_too() -> None:
    """Where no signals can be handled."""
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.extend(ReadingLoader([1, 2])))
    thread.start()
    thread.join()
    assert [int(batch) for batch in found] == [1, 2]


def test_steps_between_checkpoints_are_those_of_the_run() -> None:
    saved: list[int] = []
    trainer: Any = SimpleNamespace(accumulate_grad_batches=1, world_size=1, global_step=0)
    trainer.fit_loop = SimpleNamespace(
        epoch_loop=SimpleNamespace(batch_progress=SimpleNamespace(is_last_batch=False)), total_batch_idx=0
    )
    trainer.save_checkpoint = lambda path: saved.append(trainer.global_step)
    callback = SaveLast(Path("last.ckpt"), every_n_steps=2)
    for trainer.global_step in range(1, 9):  # of epochs of three
        callback.on_train_batch_end(trainer, LightningModule(), None, None, (trainer.global_step - 1) % 3)
    assert saved == [2, 4, 6, 8]


def test_figures_of_a_validation_that_was_left_are_given_back_once() -> None:
    callback, trainer = SaveLast(Path("last.ckpt")), SimpleNamespace(callback_metrics={})
    callback.load_state_dict({"figures": {"train_loss": torch.tensor(2.0)}})
    given: Any = (trainer, LightningModule())
    callback.setup(*given, "fit")
    callback.on_train_start(*given)
    callback.teardown(*given, "fit")
    assert trainer.callback_metrics == {"train_loss": 2.0}
    assert callback.state_dict() == {}


def test_behind_the_training_signals_are_the_commands_again() -> None:
    callback, trainer = SaveLast(Path("last.ckpt")), SimpleNamespace(callback_metrics={})
    before = [signal.getsignal(number) for number in SIGNALS]
    given: Any = (trainer, LightningModule())
    callback.setup(*given, "fit")
    callback.on_train_start(*given)
    assert [signal.getsignal(number) for number in SIGNALS] == [callback._remember] * 2
    callback.teardown(*given, "fit")
    assert [signal.getsignal(number) for number in SIGNALS] == before


class Normed(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2)


def test_each_exchange_of_the_average_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning's is behind autograd's back."""
    callback, module, trainer = AveragedWeights(decay=0.9), Normed(), SimpleNamespace()
    tensors = [*module.parameters(), *module.buffers()]
    for name in ("on_validation_epoch_start", "on_validation_epoch_end", "on_train_end"):
        monkeypatch.setattr(EMAWeightAveraging, name, lambda *_: None)
        before = [tensor._version for tensor in tensors]
        getattr(callback, name)(trainer, module)
        assert all(tensor._version > old for tensor, old in zip(tensors, before, strict=True))


def test_the_weights_that_are_saved_are_the_averaged_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a validation, where Lightning takes each for the other, and behind it."""
    held = {"model": "current", "average": "average"}

    def exchange(*_: Any) -> None:
        held["model"], held["average"] = held["average"], held["model"]

    def save(self: Any, trainer: Any, module: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint |= {"state_dict": held["average"], "current_model_state": held["model"]}

    for name in ("on_validation_epoch_start", "on_validation_epoch_end"):
        monkeypatch.setattr(EMAWeightAveraging, name, exchange)
    monkeypatch.setattr(EMAWeightAveraging, "on_save_checkpoint", save)
    callback, given = AveragedWeights(decay=0.9), (SimpleNamespace(), Normed())
    for act in (callback.on_validation_epoch_start, callback.on_validation_epoch_end):
        act(*given)  # type: ignore[arg-type]
        checkpoint: dict[str, Any] = {}
        callback.on_save_checkpoint(*given, checkpoint)  # type: ignore[arg-type]
        assert checkpoint == {"state_dict": "average", "current_model_state": "current"}


def test_of_two_damaged_checkpoints_it_is_the_last_that_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("last.ckpt", "previous.ckpt"):
        (tmp_path / name).write_bytes(b"half")
    assert last_whole(tmp_path) == tmp_path / "last.ckpt"
    assert capsys.readouterr().out == ""
