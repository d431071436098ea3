"""The training loop: AdamW under a one-cycle learning rate, cross-entropy, one record per epoch."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR
from torch.utils.data import DataLoader

from densenet_efficient.training.data import ImageData

WEIGHT_DECAY = 0.05
LABEL_SMOOTHING = 0.1

Batches = Iterable[tuple[Tensor, Tensor]]  # images [N, C, H, W], labels [N]


@dataclass(frozen=True)
class EpochRecord:
    """Mean loss and accuracy (0 to 1) of an epoch, of the augmented training images and the held-out ones."""

    epoch: int
    train_loss: float
    train_accuracy: float
    held_out_loss: float
    held_out_accuracy: float


class DeferredInterrupt:
    """Within it, Ctrl-C waits for the next `check`, so that it never cuts an optimizer step in two."""

    def __enter__(self) -> DeferredInterrupt:
        self.pending = False
        self.previous = signal.signal(signal.SIGINT, self._remember)
        return self

    def __exit__(self, *exception: object) -> None:
        signal.signal(signal.SIGINT, self.previous)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.pending = True

    def check(self) -> None:
        """Raise KeyboardInterrupt if Ctrl-C was pressed."""
        if self.pending:
            raise KeyboardInterrupt


def fit(
    model: nn.Module,
    data: ImageData,
    *,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    after_step: Callable[[], None],
    after_epoch: Callable[[EpochRecord], None],
) -> list[EpochRecord]:
    """Train `model` where it is. `after_step` and `after_epoch` may raise, which ends the training.

    Raises FloatingPointError at the first loss that is not finite.
    """
    torch.manual_seed(seed)
    batches = train_batches(data, batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=WEIGHT_DECAY)
    schedule = OneCycleLR(optimizer, learning_rate, total_steps=epochs * len(batches))
    records = []
    for epoch in range(1, epochs + 1):
        train = train_epoch(model, batches, optimizer, schedule, after_step)
        held_out = evaluate(model, DataLoader(data.held_out, batch_size))
        check_finite(held_out[0], "held-out")
        records.append(EpochRecord(epoch, *train, *held_out))
        after_epoch(records[-1])
    return records


def train_batches(data: ImageData, batch_size: int) -> DataLoader[Any]:
    """Full batches only: a last batch of one image has no variance for the batch normalization."""
    if len(data.train) < batch_size:
        raise ValueError(
            f"expected at least one batch of {batch_size} images to train on, got {len(data.train)} images; "
            "lower --batch-size"
        )
    return DataLoader(data.train, batch_size, shuffle=True, drop_last=True)


def train_epoch(
    model: nn.Module,
    batches: Batches,
    optimizer: torch.optim.Optimizer,
    schedule: LRScheduler,
    after_step: Callable[[], None],
) -> tuple[float, float]:
    """Loss and accuracy over one pass."""
    model.train()
    tally = Tally()
    for images, labels in batches:
        images, labels = to_device_of(model, images, labels)
        logits = model(images)
        loss = F.cross_entropy(logits, labels, label_smoothing=LABEL_SMOOTHING)
        check_finite(loss.item(), "training")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        tally.add(loss, logits, labels)
        after_step()
    return tally.means()


@torch.inference_mode()
def evaluate(model: nn.Module, batches: Batches) -> tuple[float, float]:
    """Mean loss (without label smoothing) and accuracy of `model` in evaluation mode."""
    model.eval()
    tally = Tally()
    for images, labels in batches:
        images, labels = to_device_of(model, images, labels)
        logits = model(images)
        tally.add(F.cross_entropy(logits, labels), logits, labels)
    return tally.means()


def to_device_of(model: nn.Module, *tensors: Tensor) -> list[Tensor]:
    device = next(model.parameters()).device
    return [tensor.to(device) for tensor in tensors]


def check_finite(loss: float, what: str) -> None:
    if not math.isfinite(loss):
        raise FloatingPointError(f"the {what} loss became {loss}; lower --learning-rate")


class Tally:
    """Sums the loss and the correct answers of batches."""

    def __init__(self) -> None:
        self.loss, self.correct, self.images = 0.0, 0, 0

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        self.loss += loss.item() * len(labels)
        self.correct += int((logits.argmax(1) == labels).sum())
        self.images += len(labels)

    def means(self) -> tuple[float, float]:
        """Loss and accuracy per image."""
        return self.loss / self.images, self.correct / self.images
