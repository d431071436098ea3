"""Runs that end before their time: what is saved on SIGTERM and Ctrl-C, and every so many steps."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from pytorch_lightning import Callback, LightningModule, Trainer

SIGNALS = (signal.SIGTERM, signal.SIGINT)


def end_with_the_run(worker: int) -> None:
    """For a process that reads images: signals are for the run alone, which needs it until its step has ended.

    They reach it where they are sent to a whole group, as by Ctrl-C, `timeout` and many a queue.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # for the thread to see who has sent it
    threading.Thread(target=_wait_for_the_run, daemon=True).start()


def _wait_for_the_run() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


class Interrupted(SystemExit):
    """The run was told to stop, and did so after a whole step. The exit code is the shell's for the signal."""

    def __init__(self, number: int, kept: Path) -> None:
        super().__init__(128 + number)
        self.message = f"Interrupted after a whole step; continue from {kept} with --ckpt_path last"

    def __str__(self) -> str:
        return self.message


def is_of_a_lost_process(error: RuntimeError) -> bool:
    """Whether it is what torch raises in a process whose training has lost another one."""
    return isinstance(error, dist.DistBackendError) or "/gloo/" in str(error)


class SaveLast(Callback):
    """Writes the last checkpoint at SIGTERM or Ctrl-C, then stops; and every `every_n_steps` steps, if given.

    It comes after the callbacks whose state belongs to the step. In the middle of gradient accumulation it waits for
    the optimizer's step, and after an epoch's last step for the epoch's own checkpoint.
    """

    def __init__(self, path: Path, every_n_steps: int | None = None) -> None:
        self.path, self.every_n_steps = path, every_n_steps
        self.received: int | None = None
        self.previous: dict[int, Any] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # Lightning has not set its own handlers yet.
        self.previous = {number: signal.getsignal(number) for number in SIGNALS}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for number in SIGNALS:
            signal.signal(number, self._remember)

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
        if trainer.world_size == 1:
            return self.received
        told = torch.tensor(self.received or 0, device=trainer.strategy.root_device)
        return int(trainer.strategy.reduce(told, reduce_op="max")) or None
