"""Exponential moving average of the weights."""

from __future__ import annotations

from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import EMAWeightAveraging
from torch.autograd.graph import increment_version


class AveragedWeights(EMAWeightAveraging):
    """Lightning's average, which validates, saves and ends with the averaged weights.

    It exchanges the values behind autograd's back, so it has to be said that they changed: at inference a model keeps
    its packed weights until it is.
    """

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_epoch_start(trainer, pl_module)
        _say_changed(pl_module)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_epoch_end(trainer, pl_module)
        _say_changed(pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        _say_changed(pl_module)


def _say_changed(module: LightningModule) -> None:
    for tensor in (*module.parameters(), *module.buffers()):
        increment_version(tensor)
