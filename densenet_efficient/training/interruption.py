"""Runs that end before their time: what is saved on SIGTERM and Ctrl-C, and every so many steps."""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import torch
import torch.distributed as dist
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor

from densenet_efficient.training.signals import SIGNALS


class Interrupted(SystemExit):
    """The run was told to stop, and did so after a whole step. The exit code is the shell's for the signal."""

    def __init__(self, number: int, kept: Path, validating: bool = False) -> None:
        super().__init__(128 + number)
        where = "in a validation, which is done again" if validating else "after a whole step"
        self.message = (
            f"Interrupted {where}; continue from {kept} with --ckpt_path last"
            if kept.exists()
            else "Interrupted before the first step; the same command begins again"
        )

    def __str__(self) -> str:
        return self.message


def is_of_a_lost_process(error: RuntimeError) -> bool:
    """Whether it is what torch raises in a process whose training has lost another one."""
    return isinstance(error, dist.DistBackendError) or "/gloo/" in str(error)


class SaveLast(Callback):
    """Writes the last checkpoint at SIGTERM or Ctrl-C, then stops; and every `every_n_steps` steps, if given.

    It comes after the callbacks whose state belongs to the step. In the middle of gradient accumulation it waits for
    the optimizer's step. A validation, which may take longer than there is time, is left after a batch; what is saved
    then begins with that validation.
    """

    def __init__(self, path: Path, every_n_steps: int | None = None) -> None:
        self.path, self.every_n_steps = path, every_n_steps
        self.received: int | None = None
        self.previous: dict[int, Any] = {}
        self.figures: dict[str, Tensor] = {}  # of the training of an epoch whose validation was left
        self.common_batches = 0  # of the validation, that every process has

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # Lightning has not set its own handlers yet.
        self.previous = {number: signal.getsignal(number) for number in SIGNALS}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for number in SIGNALS:
            signal.signal(number, self._remember)
        trainer.callback_metrics.update(self.figures)
        self.figures = {}

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = number

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        accumulates = (batch_idx + 1) % trainer.accumulate_grad_batches != 0
        if accumulates or trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            return
        told = self._told(trainer)
        if told is not None or (self.every_n_steps and trainer.global_step % self.every_n_steps == 0):
            trainer.save_checkpoint(self.path)
        if told is not None:
            raise Interrupted(told, self.path)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Of some processes the share may be a batch less, after which they do not ask whether to stop."""
        self.common_batches = self._agreed(trainer, int(sum(trainer.num_val_batches)), "min")

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if trainer.sanity_checking or batch_idx + 1 >= self.common_batches:  # the epoch's own checkpoint is near
            return
        told = self._told(trainer)
        if told is None or trainer.fit_loop.done:  # a run whose steps are done would not go back to its last validation
            return
        self._save_before_validation(trainer)
        raise Interrupted(told, self.path, validating=True)

    def _save_before_validation(self, trainer: Trainer) -> None:
        """The state at the end of the training, as Lightning would find it in the validation's first batch: to that it
        goes back, all of it."""
        training = trainer.fit_loop.epoch_loop
        self.figures = training._results.metrics(on_step=False)["callback"]
        progress = training.val_loop.batch_progress
        progress.reset()
        progress.increment_ready()
        progress.increment_started()
        trainer.save_checkpoint(self.path)

    def state_dict(self) -> dict[str, Any]:
        return {"figures": self.figures} if self.figures else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.figures = state_dict["figures"]

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop_if_told(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop_if_told(trainer)

    def _stop_if_told(self, trainer: Trainer) -> None:
        told = self._told(trainer)
        if told is not None:
            raise Interrupted(told, self.path)

    def _told(self, trainer: Trainer) -> int | None:
        """The signal that any process got: all stop at the same step."""
        return self._agreed(trainer, self.received or 0, "max") or None

    def _agreed(self, trainer: Trainer, number: int, operation: Literal["min", "max"]) -> int:
        """The least or the largest of the processes' numbers."""
        if trainer.world_size == 1:
            return number
        mine = torch.tensor(number, device=trainer.strategy.root_device)
        return int(trainer.strategy.reduce(mine, reduce_op=operation))
