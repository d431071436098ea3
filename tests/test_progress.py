"""What one sees of a run while it trains."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest
import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import RichProgressBar

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
