"""What one sees of a run while it trains."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import RichProgressBar

from densenet_efficient.training import progress as progress_module
from densenet_efficient.training.progress import Progress


@pytest.mark.parametrize(
    ("epochs", "steps", "accumulated", "left", "named"),
    [
        (30, 20, 1, "0:00:10", "Epoch 1/30"),
        (30, 10, 2, "0:00:10", "Epoch 1/30"),
        (2, -1, 1, "0:00:10", "Epoch 1/2"),
        (-1, -1, 1, None, "Epoch 1"),
    ],
)
def test_the_time_left_is_that_of_the_run(
    monkeypatch: pytest.MonkeyPatch, epochs: int, steps: int, accumulated: int, left: str | None, named: str
) -> None:
    """After ten batches of a second each, in epochs of ten, whatever ends the run first."""
    progress, loop = Progress(), SimpleNamespace(total_batch_idx=9)
    trainer = SimpleNamespace(
        fit_loop=loop, num_training_batches=10, max_epochs=epochs, max_steps=steps, accumulate_grad_batches=accumulated
    )
    progress._trainer = cast(Trainer, trainer)
    progress.run_started, progress.first_batch = 0.0, 0
    monkeypatch.setattr("time.monotonic", lambda: 10.0)
    assert progress._remaining(progress.trainer).get("ETA") == left
    assert progress._get_train_description(0) == named


def test_images_of_all_processes_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RichProgressBar, "on_train_batch_end", lambda *_: None)
    monkeypatch.setattr("time.monotonic", lambda: 2.0)
    progress, trainer = Progress(), cast(Trainer, SimpleNamespace(world_size=3))
    batch = torch.zeros(4, 1), torch.zeros(4)
    for index in range(2):
        progress.on_train_batch_end(trainer, LightningModule(), None, batch, index)
    assert progress._rate() == 4 * 3 * 2 / 2


def test_the_time_left_of_a_continued_run_is_told_by_its_own_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five in ten seconds, of which the run has ten more."""
    monkeypatch.setattr(RichProgressBar, "on_train_start", lambda *_: None)
    loop = SimpleNamespace(total_batch_idx=4)
    trainer: Any = SimpleNamespace(
        fit_loop=loop, num_training_batches=10, max_epochs=2, max_steps=-1, accumulate_grad_batches=1
    )
    progress = Progress()
    monkeypatch.setattr("time.monotonic", lambda: 0.0)
    progress.on_train_start(trainer, LightningModule())
    loop.total_batch_idx = 9
    monkeypatch.setattr("time.monotonic", lambda: 10.0)
    assert progress._remaining(trainer) == {"ETA": "0:00:20"}


def test_the_rate_is_that_of_the_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("on_train_epoch_start", "on_train_batch_end"):
        monkeypatch.setattr(RichProgressBar, name, lambda *_: None)
    progress, trainer = Progress(), cast(Trainer, SimpleNamespace(world_size=1))
    progress.images = 100  # of the epoch before
    monkeypatch.setattr("time.monotonic", lambda: 50.0)
    progress.on_train_epoch_start(trainer, LightningModule())
    monkeypatch.setattr("time.monotonic", lambda: 52.0)
    progress.on_train_batch_end(trainer, LightningModule(), None, (torch.zeros(4, 1), torch.zeros(4)), 0)
    assert progress._rate() == 2


def test_a_validation_has_no_rate_of_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RichProgressBar, "get_metrics", lambda *_: {"v_num": 3, "val_loss": 0.5})
    progress = Progress()
    progress.images = 100
    assert progress.get_metrics(cast(Trainer, SimpleNamespace(training=False)), LightningModule()) == {"val_loss": 0.5}


def test_an_epoch_is_told_by_one_process_alone() -> None:
    """Lightning disables the bars of the others."""
    progress, told = Progress(), []
    progress._console = cast(Any, SimpleNamespace(print=lambda *_, **__: told.append(1)))
    progress._trainer = trainer = cast(Trainer, SimpleNamespace(callback_metrics={}, current_epoch=0, max_epochs=2))
    progress.disable()
    progress.on_train_epoch_end(trainer, LightningModule())
    assert not told


def test_an_epoch_is_told_by_the_figures_that_it_has() -> None:
    progress = Progress()
    progress.images, progress.seconds = 10, 4.0
    metrics = {"val_loss": torch.tensor(0.5), "train_loss_epoch": torch.tensor(0.25)}
    trainer: Any = SimpleNamespace(callback_metrics=metrics, current_epoch=0, max_epochs=2)
    progress._trainer = trainer
    assert progress._epoch_line(trainer) == "Epoch 1/2: train_loss 0.2500, val_loss 0.5000, 2.5 images/s"


def test_memory_is_what_the_process_takes_now(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress_module, "status_bytes", {"VmRSS": 3 * 2**20}.__getitem__)
    assert progress_module._memory_mib(torch.device("cpu")) == 3
