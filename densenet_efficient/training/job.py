"""The main job, from images to a checkpoint, a metrics file, two pictures and the final table."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from densenet_efficient.models import EfficientDenseNet, cifar_densenet, create_model
from densenet_efficient.training.checkpoint import Checkpoint, save_checkpoint
from densenet_efficient.training.comparison import (
    CURVE_INPUT_SHAPE,
    Comparison,
    PerImplementation,
    compare,
    configs_by_depth,
    peak_memory,
)
from densenet_efficient.training.data import ImageData, load_data
from densenet_efficient.training.files import atomic_write, prepare_directory
from densenet_efficient.training.loop import DeferredInterrupt, EpochRecord, fit, train_batches
from densenet_efficient.visualize import draw_curves, draw_memory

CHECKPOINT, METRICS, CURVES, MEMORY = OUTPUTS = ("checkpoint.pt", "metrics.json", "curves.png", "memory.png")
SMALL_MODEL = "densenet-bc-40-12"


@dataclass(frozen=True)
class TrainingOptions:
    """What `densenet-efficient train` was asked for."""

    data: str
    output: Path
    model: str
    epochs: int
    batch_size: int
    learning_rate: float
    image_size: int
    checkpointing: str
    seed: int
    device: str
    threads: int | None
    memory_depths: list[int]


def train(options: TrainingOptions, console: Console) -> None:
    """Train, measure and leave four files in `options.output`. Ctrl-C leaves a checkpoint of what was learnt.

    Raises OSError, ValueError or RuntimeError before anything is written, FloatingPointError for a NaN loss.
    """
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    data = load_data(options.data, options.image_size, options.seed)
    torch.manual_seed(options.seed)
    model = build_model(options, data).to(usable_device(options.device))
    train_batches(data, options.batch_size)  # raises if there is not one full batch
    depths = configs_by_depth(options.memory_depths, options.checkpointing)
    prepare_directory(options.output)
    remove_earlier_run(options.output, console)
    checkpoint = Checkpoint(model, data.class_names, data.preprocessing)
    console.print(
        f"Training {options.model} on {len(data.train)} images of {len(data.class_names)} classes, "
        f"{len(data.held_out)} held out"
    )
    history = train_with_progress(checkpoint, data, options, console)
    comparison = with_status(
        console,
        "Measuring naive and efficient",
        lambda: compare(checkpoint, data.held_out, options.batch_size, options.device),
    )
    memory = measure_depths(depths, options.device, console)
    write_metrics(options, model, history, comparison, memory)
    draw_curves(history, options.output / CURVES)
    draw_memory(memory, options.checkpointing, options.output / MEMORY)
    console.print(comparison_table(comparison))
    console.print(f"Wrote {', '.join(OUTPUTS)} into {options.output}")


def build_model(options: TrainingOptions, data: ImageData) -> EfficientDenseNet:
    arguments: dict[str, Any] = {
        "num_classes": len(data.class_names),
        "in_channels": data.preprocessing.input_shape[0],
        "checkpointing": options.checkpointing,
    }
    if options.model == SMALL_MODEL:
        return cifar_densenet(40, 12, **arguments)
    return create_model(options.model, **arguments)


def usable_device(name: str) -> torch.device:
    """Raises ValueError for CUDA where there is none, RuntimeError for a device that torch does not know."""
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {name}: no CUDA device can be used here; use --device cpu")
    return device


def remove_earlier_run(output: Path, console: Console) -> None:
    """So that the directory never holds the results of two runs."""
    earlier = [output / name for name in OUTPUTS if (output / name).exists()]
    if earlier:
        console.print(f"Replacing the earlier run in {output}")
    for path in earlier:
        path.unlink()


def train_with_progress(
    checkpoint: Checkpoint, data: ImageData, options: TrainingOptions, console: Console
) -> list[EpochRecord]:
    """Save a checkpoint after every epoch, and on Ctrl-C one of the last whole step."""
    path = options.output / CHECKPOINT
    steps = options.epochs * len(train_batches(data, options.batch_size))
    with DeferredInterrupt() as interrupt, progress_bar(console) as progress:
        task = progress.add_task("epoch 1", total=steps)

        def after_step() -> None:
            progress.advance(task)
            interrupt.check()

        def after_epoch(record: EpochRecord) -> None:
            save_checkpoint(path, checkpoint)
            progress.update(task, description=describe(record, options.epochs))
            interrupt.check()

        try:
            return fit(
                checkpoint.model,
                data,
                epochs=options.epochs,
                batch_size=options.batch_size,
                learning_rate=options.learning_rate,
                seed=options.seed,
                after_step=after_step,
                after_epoch=after_epoch,
            )
        except KeyboardInterrupt:
            save_checkpoint(path, checkpoint)
            raise KeyboardInterrupt(f"the weights so far are in {path}") from None


def progress_bar(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console)


def describe(record: EpochRecord, epochs: int) -> str:
    accuracy = f"held-out accuracy {record.held_out_accuracy:.2%}"
    return f"epoch {record.epoch}/{epochs}  loss {record.train_loss:.3f}  {accuracy}"


def measure_depths(
    configs: dict[int, dict[str, Any]], device: str, console: Console
) -> dict[int, PerImplementation]:
    with progress_bar(console) as progress:
        return {
            depth: peak_memory(config, CURVE_INPUT_SHAPE, device)
            for depth, config in progress.track(
                configs.items(), len(configs), description="Measuring memory against depth"
            )
        }


def with_status(console: Console, message: str, work: Callable[[], Comparison]) -> Comparison:
    with console.status(message):
        return work()


def write_metrics(
    options: TrainingOptions,
    model: EfficientDenseNet,
    history: list[EpochRecord],
    comparison: Comparison,
    memory: dict[int, PerImplementation],
) -> None:
    metrics = {
        "options": {**asdict(options), "output": str(options.output)},
        "config": model.config,
        "history": [asdict(record) for record in history],
        "comparison": asdict(comparison),
        "mib_per_image_at_depth": memory,
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("densenet-efficient", "torch", "torchvision")},
        },
    }
    with atomic_write(options.output / METRICS) as file:
        file.write(json.dumps(metrics, indent=2).encode())


def comparison_table(comparison: Comparison) -> Table:
    table = Table(title="The same network, the same weights, both measured in this run")
    for column in ("", "naive", "efficient", "efficient is"):
        table.add_column(column, justify="left" if column == "" else "right")
    accuracy, step, memory = comparison.accuracy, comparison.step_ms, comparison.mib_per_image
    same = "the same" if accuracy["naive"] == accuracy["efficient"] else "different"
    table.add_row("held-out accuracy", f"{accuracy['naive']:.2%}", f"{accuracy['efficient']:.2%}", same)
    for name, values, unit in (("time per step", step, "ms"), ("peak memory per image", memory, "MiB")):
        naive, efficient = values["naive"], values["efficient"]
        table.add_row(
            name, f"{naive:.2f} {unit}", f"{efficient:.2f} {unit}", f"{naive / efficient:.1f}x less"
        )
    return table
