"""What each epoch reached."""

from __future__ import annotations

from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer

RECORDED = {
    "train_loss_epoch": "train_loss",
    "train_accuracy": "train_accuracy",
    "val_loss": "val_loss",
    "val_accuracy": "val_accuracy",
    "val_balanced_accuracy": "val_balanced_accuracy",
    "val_auroc": "val_auroc",
}


class History(Callback):
    """One record per epoch, which checkpoints keep. Training figures are of augmented images and the training loss."""

    def __init__(self) -> None:
        self.records: list[dict[str, float]] = []

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        values = trainer.callback_metrics
        record: dict[str, float] = {"epoch": trainer.current_epoch + 1}
        record |= {name: values[key].item() for key, name in RECORDED.items() if key in values}
        self.records.append(record)

    def state_dict(self) -> dict[str, Any]:
        return {"records": self.records}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.records = list(state_dict["records"])
