"""What one sees while it trains: a bar with images per second, memory and the time left, and a line per epoch."""

from __future__ import annotations

import math
import time
from datetime import timedelta
from typing import Any

import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import RichProgressBar

from densenet_efficient.measure import MIB, status_bytes
from densenet_efficient.training.history import RECORDED


class Progress(RichProgressBar):
    """Lightning's rich bar, with what matters for a long run of images."""

    def __init__(self) -> None:
        super().__init__(refresh_rate=4)
        self.images, self.seconds, self.started = 0, 0.0, 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self.run_started, self.first_batch = time.monotonic(), trainer.fit_loop.total_batch_idx + 1

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_epoch_start(trainer, pl_module)
        self.images, self.started = 0, time.monotonic()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.images += len(batch[0]) * trainer.world_size
        self.seconds = time.monotonic() - self.started
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        if self._console is not None and self.is_enabled:
            self._console.print(self._epoch_line(trainer), soft_wrap=True, highlight=False)

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        metrics = {name: value for name, value in super().get_metrics(trainer, pl_module).items() if name != "v_num"}
        if trainer.training and self.images:
            metrics["images/s"] = f"{self._rate():.1f}"
            metrics["MiB"] = f"{_memory_mib(pl_module.device):.0f}"
            metrics |= self._remaining(trainer)
        return metrics

    def _rate(self) -> float:
        return self.images / max(self.seconds, 1e-9)

    def _remaining(self, trainer: Trainer) -> dict[str, str]:
        """The time that the whole run still takes, validation included; nothing of a run without end."""
        done, total = trainer.fit_loop.total_batch_idx + 1, _batches_of_the_run(trainer)
        if math.isinf(total):
            return {}
        seconds = (time.monotonic() - self.run_started) / max(done - self.first_batch, 1) * (total - done)
        return {"ETA": str(timedelta(seconds=round(max(seconds, 0))))}

    def _epoch_line(self, trainer: Trainer) -> str:
        values = trainer.callback_metrics
        figures = ", ".join(f"{name} {values[key]:.4f}" for key, name in RECORDED.items() if key in values)
        return f"{self._get_train_description(trainer.current_epoch)}: {figures}, {self._rate():.1f} images/s"

    def _get_train_description(self, current_epoch: int) -> str:
        """Of the epoch, counted from 1, as a person does."""
        last = _epochs_of_the_run(self.trainer)
        return f"Epoch {current_epoch + 1}" + ("" if math.isinf(last) else f"/{last}")


def _epochs_of_the_run(trainer: Trainer) -> float:
    """Without end where no number of epochs ends the run: Lightning has -1 then."""
    return math.inf if trainer.max_epochs is None or trainer.max_epochs < 0 else trainer.max_epochs


def _batches_of_the_run(trainer: Trainer) -> float:
    """By epochs or by steps of the optimizer, whichever ends it first."""
    steps = math.inf if trainer.max_steps < 0 else trainer.max_steps
    return min(trainer.num_training_batches * _epochs_of_the_run(trainer), steps * trainer.accumulate_grad_batches)


def _memory_mib(device: torch.device) -> float:
    """The peak that torch has allocated on a GPU; the resident memory of the process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / MIB
    return status_bytes("VmRSS") / MIB
