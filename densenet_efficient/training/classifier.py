"""The Lightning module: a DenseNet, its loss, its metrics and its optimizer."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pytorch_lightning import LightningModule
from pytorch_lightning.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import MetricCollection
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassAUROC,
    MultilabelAccuracy,
)
from torchvision.transforms import v2

from densenet_efficient.dimensions import BatchNorm
from densenet_efficient.models import create_model
from densenet_efficient.summary import minimum_size
from densenet_efficient.training.auroc import MeanAUROC
from densenet_efficient.training.checkpoint import (
    BEST,
    SavedClassifier,
    TrainingImages,
    check_fits,
    describe_classifier,
    entry_of,
)
from densenet_efficient.training.continuation import check_options
from densenet_efficient.training.data import Task
from densenet_efficient.training.option_checks import check_above_zero, check_at_least_zero
from densenet_efficient.training.parameter_groups import HEAD_GROUP, parameter_groups
from densenet_efficient.training.schedules import Schedule, rate_factor
from densenet_efficient.training.sharding import shard
from densenet_efficient.weights import load_weights
from densenet_efficient.weights.checkpoints import ENTRY
from densenet_efficient.weights.from_torchvision import download, find_weights, names_torchvision_weights

Batch = tuple[Tensor, Tensor]  # images [N, C, H, W]; labels int64 [N], or float [N, classes]


class Classifier(LightningModule):
    """A DenseNet that is trained to classify images.

    Args:
        task: what the data are; filled in from --data.
        network: such as densenet121, densenet201, densenet-bc-100-12; `densenet-efficient summary` knows the same.
        weights: to start from: torchvision's, by name (IMAGENET1K_V1), or a file of any known library; None means
            random.
        checkpointing: what the backward recomputes: none, or bottleneck, which needs less memory.
        drop_rate: of the dropout after each layer.
        optimizer: adamw, adam or sgd (with Nesterov momentum).
        learning_rate: at the peak of the schedule.
        weight_decay: of the weights; see decay_norms.
        decay_norms: apply the weight decay to the batch norms and biases too, as the paper does.
        momentum: of sgd.
        schedule: cosine; steps (a tenth at each milestone); or constant.
        milestones: of steps, as fractions of the run.
        warmup: the fraction of the run in which the learning rate rises.
        layer_decay: the learning rate of a stage is that of the next stage times this.
        head_epochs: train the classifier alone for so many epochs first, without weight decay, with the rest frozen in
            evaluation mode.
        head_learning_rate: of the classifier in those epochs.
        frozen_batch_norm: keep the running statistics of the weights given, and normalise with them.
        label_smoothing: in [0, 1].
        mixup: alpha of mixup (arXiv:1710.09412); 0 for none.
        cutmix: alpha of cutmix (arXiv:1905.04899); 0 for none. With both, one of them at random per step.
        seed: of the weights, and of dropout, mixup and cutmix in each step.
    """

    def __init__(
        self,
        task: Task,
        network: str = "densenet121",
        weights: str | None = None,
        checkpointing: Literal["none", "bottleneck"] = "bottleneck",
        drop_rate: float = 0.0,
        optimizer: Literal["adamw", "adam", "sgd"] = "adamw",
        learning_rate: float = 1e-3,
        weight_decay: float = 0.05,
        decay_norms: bool = False,
        momentum: float = 0.9,
        schedule: Schedule = "cosine",
        milestones: tuple[float, ...] = (0.5, 0.75),
        warmup: float = 0.05,
        layer_decay: float = 1.0,
        head_epochs: int = 0,
        head_learning_rate: float = 1e-3,
        frozen_batch_norm: bool = False,
        label_smoothing: float = 0.0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_above_zero("--model.learning_rate", learning_rate)
        check_above_zero("--model.head_learning_rate", head_learning_rate)
        check_at_least_zero("--model.warmup", warmup, most=1)
        check_at_least_zero("--model.label_smoothing", label_smoothing, most=1)
        check_at_least_zero("--model.layer_decay", layer_decay, most=1)
        check_at_least_zero("--model.momentum", momentum, most=1)
        check_at_least_zero("--model.mixup", mixup)
        check_at_least_zero("--model.cutmix", cutmix)
        check_at_least_zero("--model.weight_decay", weight_decay)
        check_at_least_zero("--model.head_epochs", head_epochs)
        self.task, self.network, self.seed = task, network, seed
        self.trained_on = TrainingImages(torch.empty(0, dtype=torch.int64))
        self.optimizer, self.learning_rate, self.momentum = optimizer, learning_rate, momentum
        self.weight_decay, self.decay_norms, self.layer_decay = weight_decay, decay_norms, layer_decay
        self.schedule, self.warmup, self.milestones = schedule, warmup, milestones
        self.head_epochs, self.head_learning_rate = head_epochs, head_learning_rate
        self.frozen_batch_norm, self.label_smoothing = frozen_batch_norm, label_smoothing
        self.mix = _mixing(mixup, cutmix, len(task.class_names))
        self.class_weights: Tensor | None
        self.register_buffer("class_weights", task.class_weights, persistent=False)
        torch.manual_seed(seed)
        self.model = create_model(
            network,
            num_classes=len(task.class_names),
            in_channels=task.preprocessing.channels,
            checkpointing=checkpointing,
            drop_rate=drop_rate,
        )
        least = minimum_size(self.model)
        if task.preprocessing.image_size < least:
            size = task.preprocessing.image_size
            raise ValueError(f"--data.image_size: {network} needs images of at least {least} pixels a side, got {size}")
        if weights is not None:
            self._start_from(network, weights)
        self.train_metrics = _metrics(task, "train_", ranking=False)
        self.val_metrics = _metrics(task, "val_", ranking=True)

    def _start_from(self, network: str, weights: str) -> None:
        if Path(weights).exists():
            notes = load_weights(self.model, weights)
        else:
            if not names_torchvision_weights(weights):
                raise FileNotFoundError(
                    f"--model.weights {weights}: no such file; expected one, or a name such as IMAGENET1K_V1"
                )
            notes = load_weights(self.model, download(find_weights(network, weights)))
        for note in notes:
            print(f"{weights}: {note}")

    def configure_model(self) -> None:
        """Divide the parameters among the processes, where the strategy does so."""
        if self.device_mesh is not None and self.trainer.state.fn == TrainerFn.FITTING:
            shard(self, self.model, self.device_mesh["data_parallel"])

    @property
    def saved(self) -> SavedClassifier:
        """What a checkpoint says of this classifier."""
        task = self.task
        return SavedClassifier(self.model, task.class_names, task.multi_label, task.preprocessing, self.trained_on)

    # ---- steps ----

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model(images)
        return logits

    @property
    def trains_head_alone(self) -> bool:
        return self.current_epoch < self.head_epochs

    def on_train_start(self) -> None:
        """Before an epoch that is continued in its middle, too, whose start Lightning does not tell again."""
        self.trained_on.begin(self.trainer)
        self._set_modes()

    def on_train_epoch_start(self) -> None:
        self._set_modes()

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """What a step draws depends on its number alone, so that a run that is continued draws the same."""
        torch.manual_seed(hash((self.seed, self.trainer.fit_loop.total_batch_idx, self.global_rank)) & (2**63 - 1))

    def _set_modes(self) -> None:
        """Frozen parts stay in evaluation mode: batch norms alone, or everything but the head.

        By itself the head is trained without weight decay: AdamW is then Adam.
        """
        for group in self.trainer.optimizers[0].param_groups:
            if group["name"] == HEAD_GROUP:
                group["weight_decay"] = 0.0 if self.trains_head_alone else self.weight_decay
        self.model.train()
        if self.trains_head_alone:
            self.model.features.eval()
        elif self.frozen_batch_norm:
            for module in self.model.modules():
                if isinstance(module, BatchNorm):
                    module.eval()

    def on_validation_start(self) -> None:
        if self.trainer.state.fn == TrainerFn.VALIDATING:
            self.trained_on.warn(self.trainer)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, labels = batch
        targets = labels
        if self.mix is not None:
            images, targets = self.mix(images, labels)
        logits = self._training_logits(images)
        loss = self.loss(logits, targets, self.label_smoothing, self.class_weights)
        if not math.isfinite(loss.item()):
            raise FloatingPointError(f"the training loss became {loss.item()}; {self._remedy}")
        self.log("train_loss", loss, on_step=True, on_epoch=True, batch_size=len(images), sync_dist=True)
        self._log_metrics(self.train_metrics, logits.detach(), labels)
        return loss

    @property
    def _remedy(self) -> str:
        """Of a run that has failed, which cannot go on with another learning rate."""
        best = Path(self.trainer.default_root_dir, BEST)
        start = f", which may start from the best weights so far with --model.weights {best}" if best.exists() else ""
        return f"lower --model.learning_rate in a new run, into another --output{start}"

    def _training_logits(self, images: Tensor) -> Tensor:
        return self.model.forward_of_frozen_features(images) if self.trains_head_alone else self(images)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        images, labels = batch
        logits = self(images)
        loss = self.loss(logits, labels)
        self.log("val_loss", loss, prog_bar=True, batch_size=len(images), sync_dist=True)
        self._log_metrics(self.val_metrics, logits, labels)

    def _log_metrics(self, metrics: MetricCollection, logits: Tensor, labels: Tensor) -> None:
        metrics.update(logits.float(), labels.int() if self.task.multi_label else labels)
        self.log_dict(metrics, on_step=False, on_epoch=True, batch_size=len(labels))

    def test_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        images, labels = batch
        return {"logits": self(images).float(), "labels": labels}

    def loss(
        self, logits: Tensor, targets: Tensor, label_smoothing: float = 0.0, class_weights: Tensor | None = None
    ) -> Tensor:
        """Cross-entropy, or its binary form per class where an image may have any number of classes."""
        if not self.task.multi_label:
            return F.cross_entropy(logits, targets, class_weights, label_smoothing=label_smoothing)
        smooth = targets.to(logits.dtype) * (1 - label_smoothing) + label_smoothing / 2
        return F.binary_cross_entropy_with_logits(logits, smooth, pos_weight=class_weights)

    # ---- optimizer ----

    def configure_optimizers(self) -> Any:
        groups = parameter_groups(self.model, self.learning_rate, self.layer_decay, self.decay_norms)
        common: dict[str, Any] = {"weight_decay": self.weight_decay, "fused": self._can_fuse_optimizer()}
        if self.optimizer == "sgd":
            optimizer: torch.optim.Optimizer = torch.optim.SGD(
                groups, self.learning_rate, self.momentum, nesterov=self.momentum > 0, **common
            )
        else:
            kind = torch.optim.AdamW if self.optimizer == "adamw" else torch.optim.Adam
            optimizer = kind(groups, self.learning_rate, **common)
        total, head = self._total_steps(), self._head_steps()
        factors = [self._factor(group["name"].startswith(HEAD_GROUP), head, total) for group in optimizer.param_groups]
        schedule = {"scheduler": LambdaLR(optimizer, factors), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def _can_fuse_optimizer(self) -> bool:
        """Whether each weight is updated in one pass: AdamW takes 8 ms of a step of DenseNet-121 so, 26 otherwise.

        An optimizer that is fused divides gradients by a scaler's factor itself, so that others see them multiplied:
        Lightning refuses to clip those, in mixed precision whether or not there is a scaler.
        """
        is_clipped = bool(self.trainer.gradient_clip_val)
        is_scaled = self.trainer.precision == "16-mixed"
        return not is_clipped and not is_scaled and self.device.type in ("cpu", "cuda")

    def _total_steps(self) -> float:
        """Of a run without an end infinitely many, which its schedule must allow."""
        total = max(self.trainer.estimated_stepping_batches, 1)
        if math.isinf(total) and (self.schedule != "constant" or self.warmup > 0):
            raise ValueError(
                f"--trainer.max_epochs: --model.schedule {self.schedule} with --model.warmup {self.warmup:g} must know "
                "the end of the run, got one without; give --trainer.max_epochs or --trainer.max_steps, which "
                "--trainer.max_time may cut short, or --model.schedule constant with --model.warmup 0"
            )
        return total

    def _head_steps(self) -> int:
        """Of the optimizer, in the epochs in which the head is trained alone."""
        if self.head_epochs == 0 or self.trainer.limit_train_batches == 0:
            return 0
        self.trainer.fit_loop.setup_data()  # which counts the batches, if nothing else has yet
        batches = self.trainer.num_training_batches
        return self.head_epochs * math.ceil(batches / self.trainer.accumulate_grad_batches)

    def _factor(self, is_head: bool, head_steps: int, total: float) -> Any:
        """The factor of a group's learning rate as a function of the step."""

        def factor(step: int) -> float:
            if step < head_steps:
                return self.head_learning_rate / self.learning_rate if is_head else 0.0
            progress = (step - head_steps) / max(total - head_steps, 1)
            return rate_factor(self.schedule, progress, self.warmup, self.milestones)

        return factor

    # ---- checkpoints ----

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[ENTRY] = describe_classifier(self.saved)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        path = self.trainer.ckpt_path or ""
        check_fits(path, entry_of(path, checkpoint), self.saved)
        for state in checkpoint.get("optimizer_states", []):
            check_options(path, state["param_groups"], self)


def _metrics(task: Task, prefix: str, ranking: bool) -> MetricCollection:
    """Accuracy and balanced accuracy, and the area under the ROC curve, of which the class mean is taken."""
    count = len(task.class_names)
    metrics: dict[str, Any]
    if task.multi_label:
        metrics = {"accuracy": MultilabelAccuracy(count), "auroc": MeanAUROC(count)}
    else:
        metrics = {
            "accuracy": MulticlassAccuracy(count, average="micro"),
            "balanced_accuracy": MulticlassAccuracy(count, average="macro"),
            "auroc": MulticlassAUROC(count),
        }
    if not ranking:
        del metrics["auroc"]
    return MetricCollection(metrics, prefix=prefix)


def _mixing(mixup: float, cutmix: float, num_classes: int) -> nn.Module | None:
    kinds: list[nn.Module] = []
    if mixup:
        kinds.append(v2.MixUp(alpha=mixup, num_classes=num_classes))
    if cutmix:
        kinds.append(v2.CutMix(alpha=cutmix, num_classes=num_classes))
    if len(kinds) < 2:
        return kinds[0] if kinds else None
    return v2.RandomChoice(kinds)
