"""The commands fit, validate and test: Lightning's CLI over `Classifier` and the data modules."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger

from densenet_efficient.training import datasets  # noqa: F401, so that --data knows them
from densenet_efficient.training.averaging import AveragedWeights
from densenet_efficient.training.checkpoint import AtomicCheckpointIO, check_class_names, load_classifier
from densenet_efficient.training.classifier import Classifier
from densenet_efficient.training.data import ImageData
from densenet_efficient.training.files import prepare_directory
from densenet_efficient.training.finish import report_run
from densenet_efficient.training.history import History
from densenet_efficient.training.interruption import SaveLast
from densenet_efficient.training.progress import Progress
from densenet_efficient.training.recipes import describe_recipes, with_recipe_paths
from densenet_efficient.training.report import write_text
from densenet_efficient.training.samples import Splits

LAST, BEST = "last.ckpt", "best.ckpt"
# Of Lightning, about what is as it should be here.
EXPECTED_WARNINGS = (
    "does not have many workers",
    "exists and is not empty",
    "is smaller than the logging interval",
    "LeafSpec",
)
DESCRIPTIONS = {
    "fit": "Train a classifier of images, then report on it.",
    "validate": "Evaluate a checkpoint on the validation images.",
    "test": "Evaluate a checkpoint on the test images, or the validation images where there are none, and report.",
}


def run(command: str, arguments: Sequence[str]) -> None:
    """Run fit, validate or test with the arguments that follow it on the command line."""
    for logger in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(logger).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=f".*({'|'.join(EXPECTED_WARNINGS)})")
    TrainingCLI(command, with_recipe_paths(arguments))


class TrainingCLI(LightningCLI):
    """Parses the options of one command, and runs it."""

    def __init__(self, command: str, arguments: list[str]) -> None:
        self.command = command
        super().__init__(
            Classifier,
            ImageData,
            subclass_mode_data=True,
            seed_everything_default=0,
            save_config_callback=SaveConfig if command == "fit" else None,
            save_config_kwargs={"save_to_log_dir": False},
            parser_kwargs={
                "prog": f"densenet-efficient {command}",
                "description": DESCRIPTIONS[command],
                "epilog": f"recipes, for --config:\n{describe_recipes()}",
            },
            args=arguments,
            run=False,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            trainer_defaults={
                "max_epochs": 30,
                "accelerator": "auto",
                "log_every_n_steps": 10,
                "enable_model_summary": False,
            },
        )
        getattr(self, f"run_{command}")()

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        self.config = parser.parse_args(args)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        def add(name: str, kind: Any, default: Any, text: str) -> None:
            parser.add_argument(f"--{name}", type=kind, default=default, help=text)

        parser.link_arguments("data.task", "model.task", apply_on="instantiate")
        parser.link_arguments("seed_everything", "model.seed")
        parser.link_arguments("seed_everything", "data.init_args.seed")
        parser.add_argument("--output", type=Path, required=True, help="the directory of the run")
        add("ckpt_path", str | None, None, "a checkpoint, or last or best of --output; of fit, to continue from")
        add("threads", int | None, None, "CPU threads; torch decides if not given")
        add("report", bool, True, "write report.html, its pictures and metrics.json into --output")
        if self.command != "fit":
            return
        add("overwrite", bool, False, "replace the run that --output holds")
        add("monitor", str, "val_loss", "what the best checkpoint is best in: val_loss, val_accuracy, val_auroc, ...")
        add("patience", int | None, None, "stop after so many epochs without a better --monitor")
        add("ema_decay", float | None, None, "validate and save an exponential moving average of the weights")
        add("save_every_n_steps", int | None, None, "write the last checkpoint within an epoch too")
        add("compare", bool, False, "finally measure the naive implementation beside the efficient one")

    # ---- what is built ----

    def before_instantiate_classes(self) -> None:
        """Nothing is written before everything else is known to be in order."""
        if self.config.threads is not None:
            torch.set_num_threads(self.config.threads)
        output = Path(self.config.output)
        earlier = [name for name in (LAST, BEST) if (output / name).exists()]
        if self.command == "fit" and earlier and self.config.ckpt_path is None and not self.config.overwrite:
            raise FileExistsError(
                f"{output} holds an earlier run; continue it with --ckpt_path last, replace it with --overwrite true, "
                "or choose another --output"
            )

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        output = Path(self.config.output)
        prepare_directory(output)
        self.trainer_defaults["callbacks"] = self._fit_callbacks() if self.command == "fit" else [Progress()]
        if self.config.trainer.logger is None and self.command == "fit":
            board = TensorBoardLogger(output, "logs")
            kwargs["logger"] = [board, CSVLogger(output, "logs", board.version)]
        return super().instantiate_trainer(
            **kwargs, default_root_dir=output, plugins=[AtomicCheckpointIO()], use_distributed_sampler=False
        )

    def _fit_callbacks(self) -> list[Callback]:
        """In the order in which they act: a checkpoint comes after what it is to hold."""
        config, output = self.config, Path(self.config.output)
        self.history = History()
        mode = "min" if config.monitor.endswith("loss") else "max"
        callbacks: list[Callback] = [Progress(), LearningRateMonitor("step"), self.history]
        if config.ema_decay is not None:
            callbacks.append(AveragedWeights(decay=config.ema_decay))
        if config.patience is not None:
            callbacks.append(EarlyStopping(config.monitor, patience=config.patience, mode=mode))
        best = ModelCheckpoint(
            output,
            Path(BEST).stem,
            config.monitor,
            mode=mode,
            save_last=True,
            save_on_train_epoch_end=True,
            auto_insert_metric_name=False,
            enable_version_counter=False,
        )
        return [*callbacks, SaveLast(output / LAST, config.save_every_n_steps), best]

    # ---- what is run ----

    def run_fit(self) -> None:
        output, config = Path(self.config.output), self.config
        if config.overwrite and config.ckpt_path is None:
            for name in (LAST, BEST):
                (output / name).unlink(missing_ok=True)
        checkpoint = self._checkpoint()
        print(self._announcement())
        self.trainer.fit(self.model, datamodule=self.datamodule, ckpt_path=checkpoint)
        if config.report and not config.trainer.fast_dev_run:
            if (output / BEST).exists():
                self._load_weights(output / BEST)
            self._report(self.history.records, config.compare)

    def _announcement(self) -> str:
        splits: Splits = self.datamodule.splits
        return (
            f"Training {self.model.network} on {len(splits.train)} images of {len(splits.class_names)} classes, "
            f"with {len(splits.validation)} to validate by"
        )

    def run_validate(self) -> None:
        self._load_weights(self._required_checkpoint())
        self.trainer.validate(self.model, datamodule=self.datamodule)

    def run_test(self) -> None:
        self._load_weights(self._required_checkpoint())
        self._report([], comparison=False)

    def _report(self, history: list[dict[str, float]], comparison: bool) -> None:
        text = self.parser.dump(self.config, skip_none=False)
        output = Path(self.config.output)
        report_run(
            self.trainer, self.model, self.datamodule, output, history=history, config=text, comparison=comparison
        )

    def _checkpoint(self) -> Path | None:
        """The file that --ckpt_path means. A run that is to continue from its last may be its first start."""
        given = self.config.ckpt_path
        if given not in ("last", "best"):
            return None if given is None else Path(given)
        path = Path(self.config.output) / f"{given}.ckpt"
        if given == "last" and self.command == "fit" and not path.exists():
            print(f"{path} does not exist yet: starting from the beginning")
            return None
        return path

    def _required_checkpoint(self) -> Path:
        path = self._checkpoint()
        if path is None:
            raise ValueError(f"{self.command} needs --ckpt_path: a checkpoint, or best or last of --output")
        return path

    def _load_weights(self, path: Path) -> None:
        saved = load_classifier(path)
        check_class_names(path, saved.class_names, self.model.task.class_names)
        self.model.model.load_state_dict(saved.model.state_dict())


class SaveConfig(SaveConfigCallback):
    """Writes the configuration beside the checkpoints, where `test` finds it."""

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        text = self.parser.dump(self.config, skip_none=False)
        write_text(Path(trainer.default_root_dir) / "config.yaml", text)
