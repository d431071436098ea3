"""Exponential moving average of the weights."""

from __future__ import annotations

from typing import Any

from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import EMAWeightAveraging
from torch.autograd.graph import increment_version


class AveragedWeights(EMAWeightAveraging):
    """Lightning's average, which validates, saves and ends with the averaged weights.

    It exchanges the values behind autograd's back, so it has to be said that they changed: at inference a model keeps
    its packed weights until it is.
    """

    exchanged = False  # in a validation

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_epoch_start(trainer, pl_module)
        self.exchanged = True
        _say_changed(pl_module)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_epoch_end(trainer, pl_module)
        self.exchanged = False
        _say_changed(pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """In a validation too, where Lightning would take each of the two for the other."""
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        if self.exchanged:
            average, current = checkpoint["current_model_state"], checkpoint["state_dict"]
            checkpoint["state_dict"], checkpoint["current_model_state"] = average, current

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        _say_changed(pl_module)


def _say_changed(module: LightningModule) -> None:
    for tensor in (*module.parameters(), *module.buffers()):
        increment_version(tensor)
