"""Naive against efficient, measured: accuracy with the same weights, time per step, peak memory per image."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from densenet_efficient.measure import make_step, peak_memory_per_image, step_times
from densenet_efficient.models import EfficientDenseNet, cifar_densenet
from densenet_efficient.reference import NaiveDenseNet

FACTORIES: dict[str, Callable[..., nn.Module]] = {"naive": NaiveDenseNet, "efficient": EfficientDenseNet}

CURVE_INPUT_SHAPE = (3, 32, 32)  # CIFAR's images, for `configs_by_depth`

PerImplementation = dict[str, float]  # one value for "naive" and one for "efficient"


@dataclass(frozen=True)
class Comparison:
    """What the same network with the same weights reaches and costs in both implementations."""

    accuracy: PerImplementation  # 0 to 1, of the validation images
    step_ms: PerImplementation  # milliseconds per training step
    mib_per_image: PerImplementation  # MiB that each image of a training batch adds to the peak


def compare(
    model: EfficientDenseNet,
    input_shape: tuple[int, int, int],  # channels, height, width
    batches: Iterable[tuple[Tensor, Tensor]],
    batch_size: int,
    device: str,
) -> Comparison:
    """Put the weights of `model` into both implementations and measure both, in this run."""
    models = {name: factory(**model.config).to(device) for name, factory in FACTORIES.items()}
    for other in models.values():
        other.load_state_dict(model.state_dict())
    accuracy = {name: _accuracy(other, batches, device) for name, other in models.items()}
    # Only now, since these steps train the models.
    steps = {name: make_step(other, input_shape, batch_size, device=device) for name, other in models.items()}
    return Comparison(accuracy, step_times(steps), compare_memory(model.config, input_shape, device))


@torch.inference_mode()
def _accuracy(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], device: str) -> float:
    """Of several labels per image, the share of labels that are right."""
    model.eval()
    right, count = 0, 0
    for images, labels in batches:
        logits = model(images.to(device)).cpu()
        given = logits.argmax(1) if labels.dim() == 1 else (logits >= 0).to(labels.dtype)
        right += int((given == labels).sum())
        count += labels.numel()
    return right / count


def compare_memory(config: dict[str, Any], input_shape: tuple[int, int, int], device: str) -> PerImplementation:
    """MiB per image of a training step. Small images come in larger batches, to rise above the noise."""
    batches = (8, 24) if input_shape[-1] >= 32 else (32, 96)

    def measure(factory: Callable[..., nn.Module]) -> float:
        name = f"{factory.__module__}:{factory.__qualname__}"
        return peak_memory_per_image(name, config, input_shape, batches, device=device)

    with ThreadPoolExecutor(len(FACTORIES)) as pool:  # the threads only wait for the measured processes
        return dict(zip(FACTORIES, pool.map(measure, FACTORIES.values()), strict=True))


def configs_by_depth(depths: Sequence[int], checkpointing: str) -> dict[int, dict[str, Any]]:
    """The paper's DenseNets-BC of growth rate 12 for CIFAR. Raises ValueError for a depth that none has."""
    return {depth: cifar_densenet(depth, 12, checkpointing=checkpointing).config for depth in depths}


def comparison_table(comparison: Comparison) -> Table:
    """One row per figure; the last column is how many times less the efficient implementation needs."""
    table = Table(title="The same network with the same weights, both measured in this run")
    table.add_column("")
    for column in ("naive", "efficient", "naive / efficient"):
        table.add_column(column, justify="right")
    accuracy = comparison.accuracy
    verdict = "equal" if accuracy["naive"] == accuracy["efficient"] else "NOT EQUAL"
    table.add_row("validation accuracy", f"{accuracy['naive']:.2%}", f"{accuracy['efficient']:.2%}", verdict)
    for name, unit, cost in (
        ("time per step", "ms", comparison.step_ms),
        ("peak memory per image", "MiB", comparison.mib_per_image),
    ):
        naive, efficient = cost["naive"], cost["efficient"]
        table.add_row(name, f"{naive:.2f} {unit}", f"{efficient:.2f} {unit}", f"{naive / efficient:.1f}x")
    return table
