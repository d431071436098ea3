"""The commands that train and look at data: Lightning's CLI over `Classifier` and the data modules."""

from __future__ import annotations

import json
import math
import numbers
import signal
import sys
from argparse import SUPPRESS, RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml  # type: ignore[import-untyped]
from jsonargparse import ArgumentError, ArgumentParser, DefaultHelpFormatter
from jsonargparse.typing import register_type
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import LearningRateMonitor
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from pytorch_lightning.plugins.precision import MixedPrecision
from pytorch_lightning.strategies import DDPStrategy
from pytorch_lightning.tuner.tuning import Tuner
from pytorch_lightning.utilities.exceptions import SIGTERMException

from densenet_efficient.files import naming_full_disk, prepare_directory, remove_left_over
from densenet_efficient.models import EfficientDenseNet
from densenet_efficient.training import datasets  # noqa: F401, so that --data knows them
from densenet_efficient.training.averaging import AveragedWeights
from densenet_efficient.training.batch_size import available_memory, largest_batch, measure_training
from densenet_efficient.training.check import examine_data, print_data_report
from densenet_efficient.training.checkpoint import (
    BEST,
    LAST,
    PREVIOUS,
    AtomicCheckpointIO,
    check_fits,
    describe_classifier,
    last_whole,
    load_classifier,
)
from densenet_efficient.training.classifier import Classifier
from densenet_efficient.training.command_errors import say_what_is_wrong
from densenet_efficient.training.continuation import BestCheckpoint, StopEarly, is_own_checkpoint
from densenet_efficient.training.data import FolderData, ImageData
from densenet_efficient.training.finish import report_run
from densenet_efficient.training.history import History
from densenet_efficient.training.interruption import Interrupted, SaveLast, is_of_a_lost_process
from densenet_efficient.training.option_checks import check_above_zero
from densenet_efficient.training.pictures import draw_learning_rates
from densenet_efficient.training.process_group import let_go_of_exchanged
from densenet_efficient.training.progress import Progress
from densenet_efficient.training.quiet import quieten_lightning
from densenet_efficient.training.recipes import describe_recipes
from densenet_efficient.training.report import METRICS, PAGE, write_text
from densenet_efficient.training.samples import Splits
from densenet_efficient.training.sharding import FSDP, FullySharded
from densenet_efficient.training.shorthands import DATA_NAMES, FORMS_OF_DATA, expand_shorthands
from densenet_efficient.training.synchronised import SynchronisedOnCPUs

# The type of many an augmentation's argument, which config.yaml is to hold as the number it is.
register_type(numbers.Number, serializer=lambda value: value, deserializer=float, type_check=isinstance)
# With their limits. (As the parser's own types they would stand in checkpoints, which hold plain values only.)
NUMBERS_ABOVE_ZERO = dict.fromkeys(("threads", "memory", "patience", "save_every_n_steps"), math.inf) | {"ema_decay": 1}
SEED_OF_DATA = ("--data.seed", "--data.init_args.seed")
MOST_SEED = 2**32 - 1  # that NumPy takes
CONFIG = "config.yaml"  # of a run, beside its checkpoints
COPIES = {"adamw": 2, "adam": 2, "sgd": 1}  # of the parameters, that the optimizers keep
DTYPES = {"32": "float32", "bf16": "bfloat16", "16": "float16", "64": "float64"}  # of --trainer.precision
DESCRIPTIONS = {
    "fit": "Train a classifier of images, then report on it.",
    "validate": "Evaluate a checkpoint on the validation images.",
    "test": "Evaluate a checkpoint on the test images, or the validation images where there are none, into test/.",
    "find-learning-rate": "Train for a short while with growing learning rates, and suggest one.",
    "find-batch-size": "Measure the memory that training takes, and find the largest batch that fits.",
    "check-data": "Read every image once; count the classes; find damaged and repeated files. "
    "With --config the data of a recipe, or of a run's config.yaml.",
}


def run(command: str, arguments: Sequence[str]) -> int:
    """Run a training command with the arguments that follow it on the command line, and return its exit status."""
    quieten_lightning()
    given = expand_shorthands(arguments)
    try:
        if command == "check-data":
            return check_data(given)
        TrainingCLI(command, given)
    except ArgumentError as error:
        return say_what_is_wrong(command, given, error)
    except MisconfigurationException as error:
        raise ValueError(str(error)) from error
    except ValueError as error:
        if error.__cause__ is not None and str(error).startswith("Does not validate"):
            raise error.__cause__ from error  # what a data module said, which the parser has wrapped
        raise
    except RuntimeError as error:
        if is_of_a_lost_process(error):
            reason = "another process of this training has ended, and what it printed says why"
            raise RuntimeError(f"{reason}; the same command with --ckpt_path last goes on ({error})") from error
        raise
    except Interrupted as interrupt:
        print(interrupt, file=sys.stderr)
        return int(interrupt.code or 0)
    except SIGTERMException:  # Lightning's, in an evaluation
        print("Interrupted", file=sys.stderr)
        return 128 + signal.SIGTERM
    except SystemExit as end:
        if isinstance(end.__context__, KeyboardInterrupt):  # which Lightning makes a status of 1, without a word
            raise KeyboardInterrupt from end
        raise
    finally:
        let_go_of_exchanged()
    return 0


def check_data(arguments: list[str]) -> int:
    """Examine data, print what was found, and return 1 if anything in it must be put right."""
    parser = Parser(prog="densenet-efficient check-data", description=DESCRIPTIONS["check-data"], exit_on_error=False)
    parser.add_subclass_arguments(ImageData, "data", required=True)
    data: ImageData = parser.instantiate(parser.parse_args(_with_data_of_configs(arguments))).data
    return print_data_report(examine_data(data.splits, data.read_source), in_memory=data.in_memory)


def _with_data_of_configs(arguments: Sequence[str]) -> list[str]:
    """Each --config, which may be a recipe or a run's config.yaml, as the options of data that it holds."""
    result: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        path = next(rest, None) if argument == "--config" else None
        result += [argument] if path is None else _data_of_config(Path(path))
    return result


def _data_of_config(path: Path) -> list[str]:
    try:
        config = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"--config {path}: expected YAML, got a file that is none ({reason})") from error
    if not isinstance(config, dict):
        raise ValueError(f"--config {path}: expected options as of densenet-efficient fit, got {config}")
    if "data" not in config:
        return []
    data, seed = config["data"], config.get("seed_everything", True)
    # The splits follow from the seed. One that is true stands for any.
    seeded = [] if isinstance(seed, bool) or seed is None else ["--data.seed", str(seed)]
    return ["--data", data if isinstance(data, str) else json.dumps(data, default=str), *seeded]


class HelpFormatter(DefaultHelpFormatter, RawDescriptionHelpFormatter):
    """Keeps the lines of the recipes apart."""


class Parser(LightningArgumentParser):
    """Explains the data too: the forms of --data, and the options of a folder, which those of the others resemble."""

    has_data = False  # unlike the parsers by which jsonargparse explains a single class

    def add_subclass_arguments(self, *args: Any, **kwargs: Any) -> Any:
        self.has_data = True
        kinds = ", ".join(DATA_NAMES.values())
        text = f"{FORMS_OF_DATA}; or a class. --data.help KIND lists the options of {kinds}; a folder's are below"
        return super().add_subclass_arguments(*args, **kwargs | {"help": text})

    def format_help(self, *args: Any) -> str:
        if not self.has_data:
            return super().format_help(*args)
        folder = ArgumentParser(usage=SUPPRESS, add_help=False)
        folder.add_class_arguments(FolderData, "data", as_group=False, skip={"seed"})
        options = folder.format_help().removeprefix("options:\n")
        return f"{super().format_help(*args)}\noptions of --data FOLDER:\n{options}"


class TrainingCLI(LightningCLI):
    """Parses the options of one command, and runs it."""

    def __init__(self, command: str, arguments: list[str]) -> None:
        self.command = command
        super().__init__(
            Classifier,
            ImageData,
            subclass_mode_data=True,
            parser_class=Parser,
            seed_everything_default=0,
            save_config_callback=SaveConfig if command == "fit" else None,
            save_config_kwargs={"save_to_log_dir": False},
            parser_kwargs={
                "prog": f"densenet-efficient {command}",
                "description": DESCRIPTIONS[command],
                "usage": f"densenet-efficient {command} [--config FILE_OR_RECIPE] [options]",
                "exit_on_error": False,
                "epilog": f"recipes, for --config:\n{describe_recipes()}",
                "formatter_class": HelpFormatter,
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
        getattr(self, f"run_{command.replace('-', '_')}")()

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        if any(argument.partition("=")[0] in SEED_OF_DATA for argument in args):  # which would go unheard
            raise ValueError("--data.seed: a run has one seed for all, --seed_everything; give that")
        self.config = parser.parse_args(args)
        seed = self.config.seed_everything  # by which Lightning seeds NumPy too, before all else
        if not isinstance(seed, bool | None) and not 0 <= seed <= MOST_SEED:
            raise ValueError(f"--seed_everything: expected a number of 0 to {MOST_SEED}, got {seed}")

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        def add(name: str, kind: Any, default: Any, text: str) -> None:
            parser.add_argument(f"--{name}", type=kind, default=default, help=text)

        parser.link_arguments("data.task", "model.task", apply_on="instantiate")
        parser.link_arguments("seed_everything", "model.seed")
        parser.link_arguments("seed_everything", "data.init_args.seed")
        add("threads", int | None, None, "CPU threads; torch decides if not given")
        if self.command == "find-batch-size":
            add("memory", float | None, None, "GiB to stay within; all that are free if not given")
        parser.add_argument("--output", type=Path, required=True, help="the directory of the run")
        add("ckpt_path", str | None, None, "a checkpoint, or last or best of --output; of fit, to continue from")
        add("report", bool, True, "write report.html, its pictures and metrics.json into --output")
        add("overwrite", bool, False, "of fit: replace the run that --output holds")
        best = "of fit: what the best checkpoint is best in: val_loss, val_accuracy, val_auroc, ..."
        add("monitor", str, "val_loss", best)
        add("patience", int | None, None, "of fit: stop after so many epochs without a better --monitor")
        average = "of fit: validate and save an exponential moving average of the weights (not with fsdp)"
        add("ema_decay", float | None, None, average)
        add("save_every_n_steps", int | None, None, "of fit: write the last checkpoint within an epoch too")
        add("compare", bool, False, "of fit: finally measure the naive implementation beside the efficient one")

    # ---- what is built ----

    def before_instantiate_classes(self) -> None:
        """Nothing is written before everything else is known to be in order."""
        trainer = self.config.trainer
        for name in ("accumulate_grad_batches", "check_val_every_n_epoch"):
            if trainer[name] is not None:
                check_above_zero(f"--trainer.{name}", trainer[name])
        if trainer.overfit_batches:
            raise ValueError("--trainer.overfit_batches: not here; give a smaller table or folder as --data")
        for name, below in NUMBERS_ABOVE_ZERO.items():
            number = self.config.get(name)
            if number is not None:
                check_above_zero(f"--{name}", number, below)
        if trainer.strategy == FSDP and self.config.get("ema_decay") is not None:
            raise ValueError(
                "--ema_decay keeps all weights in each process, which --trainer.strategy fsdp divides; take ddp"
            )
        if self.config.threads is not None:
            torch.set_num_threads(self.config.threads)
        output = Path(self.config.output)
        if self.command != "fit" or self.config.overwrite or is_own_checkpoint(self.config.ckpt_path, output):
            return
        if any((output / name).exists() for name in (LAST, BEST)):
            raise FileExistsError(
                f"{output} holds an earlier run; continue it with --ckpt_path last, replace it with --overwrite true, "
                "or choose another --output"
            )

    def instantiate_classes(self) -> None:
        """What is evaluated has the weights of its checkpoint; those of --model.weights need not be there any more."""
        given = self.config.model.weights
        if self.command in ("validate", "test"):
            self.config.model.weights = None
        super().instantiate_classes()
        self.config.model.weights = given

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        if self.command == "find-batch-size":
            return super().instantiate_trainer(**kwargs, logger=False)
        if self.command == "fit":
            self._check_monitor()
        output = Path(self.config.output)
        plugins: list[Any] = [AtomicCheckpointIO()]
        if self.config.trainer.strategy == FSDP:
            kwargs["strategy"] = FullySharded()
        elif self._on_cpu and str(self.config.trainer.precision) in ("16", "16-mixed"):  # Lightning takes bfloat16
            plugins.append(MixedPrecision("16-mixed", "cpu"))
            kwargs["precision"] = None
        if self._on_cpu and self.config.trainer.strategy == "ddp" and self.config.trainer.sync_batchnorm:
            kwargs |= {"strategy": SynchronisedOnCPUs(), "sync_batchnorm": False}
        prepare_directory(output)
        self.trainer_defaults["callbacks"] = self._fit_callbacks() if self.command == "fit" else self._progress()
        if self.command != "fit":
            kwargs["logger"] = False
        elif self.config.trainer.logger is None:
            board = TensorBoardLogger(output, "logs")
            kwargs["logger"] = [board, CSVLogger(output, "logs", board.version)]
        try:
            trainer = super().instantiate_trainer(
                **kwargs, default_root_dir=output, plugins=plugins, use_distributed_sampler=False
            )
        except TypeError as error:  # Lightning's word for many a wrong value
            raise ValueError(f"--trainer: {error}") from error
        if isinstance(trainer.strategy, DDPStrategy) and self.config.model.head_epochs > 0:
            trainer.strategy._ddp_kwargs["find_unused_parameters"] = True  # those of all but the head, at first
        return trainer

    def _check_monitor(self) -> None:
        """Before the first epoch, at whose end Lightning would find out, and save nothing."""
        known = ["val_loss", *self.model.val_metrics, "train_loss", *self.model.train_metrics]
        if self.config.monitor not in known:
            raise ValueError(f"--monitor {self.config.monitor}: expected one of {', '.join(known)}")

    @property
    def _on_cpu(self) -> bool:
        given = self.config.trainer.accelerator
        return given == "cpu" or (given == "auto" and not torch.accelerator.is_available())

    def _progress(self) -> list[Callback]:
        return [] if self.config.trainer.enable_progress_bar is False else [Progress()]

    def _fit_callbacks(self) -> list[Callback]:
        """In the order in which they act: a checkpoint comes after what it is to hold."""
        config, output = self.config, Path(self.config.output)
        self.history = History()
        mode = "min" if config.monitor.endswith("loss") else "max"
        callbacks = [*self._progress(), self.history]
        if config.trainer.logger is None or config.trainer.logger:
            callbacks.append(LearningRateMonitor("step"))
        if config.ema_decay is not None:
            callbacks.append(AveragedWeights(decay=config.ema_decay))
        if config.patience is not None:
            callbacks.append(StopEarly(config.monitor, patience=config.patience, mode=mode))
        best = BestCheckpoint(
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
        checkpoint = self._checkpoint()
        self.datamodule.require_training_images()
        if self.trainer.is_global_zero:
            self._announce()
        with naming_full_disk(output):
            self.trainer.fit(self.model, datamodule=self.datamodule, ckpt_path=checkpoint)
        if config.report and not config.trainer.fast_dev_run:
            if (output / BEST).exists():
                self._load_weights(output / BEST)
            self._report(output, self.history.records, config.compare)

    def _announce(self) -> None:
        splits: Splits = self.datamodule.splits
        print(
            f"Training {self.model.network} on {len(splits.train)} images of {len(splits.class_names)} classes, "
            f"with {len(splits.validation)} to validate by"
        )
        epochs, head_epochs = self.trainer.max_epochs, self.model.head_epochs
        if epochs is not None and 0 < epochs <= head_epochs:
            print(
                f"--model.head_epochs {head_epochs} of --trainer.max_epochs {epochs}: "
                "the classifier alone is trained, the rest of the network never",
                file=sys.stderr,
            )

    def run_validate(self) -> None:
        self._load_weights(self._required_checkpoint())
        self.trainer.validate(self.model, datamodule=self.datamodule)

    def run_test(self) -> None:
        self._load_weights(self._required_checkpoint())
        folder = Path(self.config.output) / "test"
        prepare_directory(folder)
        self._report(folder, [], comparison=False)

    def run_find_learning_rate(self) -> None:
        self.trainer.fit_loop.max_epochs = 1000  # as many steps as it takes
        self.model.head_epochs = 0
        finder = Tuner(self.trainer).lr_find(self.model, datamodule=self.datamodule, min_lr=1e-6, max_lr=1.0)
        suggestion = finder.suggestion() if finder else None
        if not finder or suggestion is None:
            raise RuntimeError("no learning rate stands out; train for longer, or with larger batches")
        picture = Path(self.config.output) / "learning-rate.png"
        draw_learning_rates(finder.results["lr"], finder.results["loss"], suggestion, picture)
        print(f"--model.learning_rate {suggestion:.2g}; the losses are drawn in {picture}")

    def run_find_batch_size(self) -> None:
        self.datamodule.require_training_images()
        images = len(self.datamodule.splits.train) // (self.trainer.num_devices * self.trainer.num_nodes)
        device = str(self.trainer.strategy.root_device)
        budget = int(self.config.memory * 2**30) if self.config.memory else available_memory(device)
        precision = str(self.trainer.precision).partition("-")[0]
        measure = measure_training(
            self.model.model,
            self.datamodule.preprocessing.input_shape,
            device,
            DTYPES[precision],
            COPIES[self.model.optimizer] + (self.config.ema_decay is not None),
        )
        batch, peak = largest_batch(measure, budget, images)
        limit = " (there are no more images to train on)" if batch == images else ""
        memory = f"{peak / 2**30:.2f} of {budget / 2**30:.2f} GiB on {device}"
        print(f"--data.batch_size {batch}{limit}: a step takes {memory}")

    def _report(self, folder: Path, history: list[dict[str, float]], comparison: bool) -> None:
        text = self.parser.dump(self.config)
        report_run(
            self.trainer, self.model, self.datamodule, folder, history=history, config=text, comparison=comparison
        )

    def _checkpoint(self) -> Path | None:
        """The file that --ckpt_path means. A run that is to continue from its last may be its first start."""
        given = self.config.ckpt_path
        if given not in ("last", "best"):
            return None if given is None else Path(given)
        output = Path(self.config.output)
        path = last_whole(output) if given == "last" else output / BEST
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
        check_fits(path, describe_classifier(saved), self.model.saved)
        epsilon = {"norm_eps": saved.model.config["norm_eps"]}  # which weights of Keras bring
        network = EfficientDenseNet(**self.model.model.config | epsilon)  # that of the training may be sharded
        network.load_state_dict(saved.model.state_dict())
        self.model.model = network


class SaveConfig(SaveConfigCallback):
    """Writes the configuration beside the checkpoints, where `test` finds it; removes those of a run to be replaced,
    and what a killed one left half written: the directory is this run's alone.

    It does so when the training really starts, so that what is refused before leaves an earlier run as it was.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Before the checkpoint is read that may be refused, so too early."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            self.save_config(trainer, pl_module, "fit")

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        output = Path(trainer.default_root_dir)
        if self.config.overwrite and not is_own_checkpoint(self.config.ckpt_path, output):
            for name in (LAST, PREVIOUS, BEST):
                (output / name).unlink(missing_ok=True)
        remove_left_over(output / name for name in (LAST, PREVIOUS, BEST, CONFIG, METRICS, PAGE))
        config = self.config.clone()
        config.overwrite, config.ckpt_path = False, None  # of this call, not of the run
        write_text(output / CONFIG, self.parser.dump(config))
