"""The main job, from images to a checkpoint, a metrics file, two pictures and the final table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from densenet_efficient.models import EfficientDenseNet, create_model
from densenet_efficient.training.checkpoint import Checkpoint, save_checkpoint
from densenet_efficient.training.comparison import (
    CURVE_INPUT_SHAPE,
    PerImplementation,
    compare,
    configs_by_depth,
    peak_memory,
)
from densenet_efficient.training.data import ImageData, load_data
from densenet_efficient.training.files import prepare_directory
from densenet_efficient.training.loop import DeferredInterrupt, EpochRecord, fit, train_batches
from densenet_efficient.training.report import comparison_table, write_metrics
from densenet_efficient.visualize import draw_curves, draw_memory

OUTPUTS = ("checkpoint.pt", "metrics.json", "curves.png", "memory.png")
CHECKPOINT, METRICS, CURVES, MEMORY = OUTPUTS


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
    """Train, measure and leave four files in `options.output`. Ctrl-C leaves the checkpoint alone.

    Raises OSError, ValueError or RuntimeError before anything is written, FloatingPointError for a NaN loss.
    """
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    data = load_data(options.data, options.image_size, options.seed)
    steps = options.epochs * len(train_batches(data, options.batch_size))
    model = build_model(options, data).to(usable_device(options.device))
    depths = configs_by_depth(options.memory_depths, options.checkpointing)
    prepare_directory(options.output)
    remove_earlier_run(options.output, console)
    checkpoint = Checkpoint(model, data.class_names, data.preprocessing)
    console.print(
        f"Training {options.model} on {len(data.train)} images of {len(data.class_names)} classes, "
        f"{len(data.held_out)} held out"
    )
    try:
        history = train_with_progress(checkpoint, data, steps, options, console)
        with console.status("Measuring naive and efficient"):
            comparison = compare(checkpoint, data.held_out, options.batch_size, options.device)
        memory = measure_depths(depths, options.device, console)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"the weights so far are in {options.output / CHECKPOINT}") from None
    write_metrics(
        options.output / METRICS,
        options=asdict(options),
        config=model.config,
        history=history,
        comparison=comparison,
        mib_per_image_at_depth=memory,
    )
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
    checkpoint: Checkpoint, data: ImageData, steps: int, options: TrainingOptions, console: Console
) -> list[EpochRecord]:
    """Save a checkpoint after every epoch, and on Ctrl-C one of the last whole step."""
    path = options.output / CHECKPOINT
    with DeferredInterrupt() as interrupt, progress_bar(console) as progress:
        task = progress.add_task(f"epoch 1/{options.epochs}", total=steps)

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
            raise


def measure_depths(
    configs: Mapping[int, dict[str, Any]], device: str, console: Console
) -> dict[int, PerImplementation]:
    """Peak memory per image of the networks `configs`, by depth."""
    with progress_bar(console) as progress:
        task = progress.add_task("Measuring memory against depth", total=len(configs))
        memory = {}
        for depth, config in configs.items():
            memory[depth] = peak_memory(config, CURVE_INPUT_SHAPE, device)
            progress.advance(task)
        return memory


def progress_bar(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console)


def describe(record: EpochRecord, epochs: int) -> str:
    accuracy = f"held-out accuracy {record.held_out_accuracy:.2%}"
    return f"epoch {record.epoch}/{epochs}  loss {record.train_loss:.3f}  {accuracy}"
