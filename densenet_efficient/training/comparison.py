"""Naive against efficient, measured: accuracy with the same weights, time per step, peak memory per image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.utils.data import DataLoader

from densenet_efficient.measure import make_step, peak_memory_per_image, step_times
from densenet_efficient.models import EfficientDenseNet, cifar_densenet
from densenet_efficient.reference import NaiveDenseNet
from densenet_efficient.training.checkpoint import Checkpoint
from densenet_efficient.training.data import LabelledImages
from densenet_efficient.training.loop import evaluate

FACTORIES: dict[str, Callable[..., nn.Module]] = {"naive": NaiveDenseNet, "efficient": EfficientDenseNet}

CURVE_INPUT_SHAPE = (3, 32, 32)  # CIFAR's images, for `configs_by_depth`

PerImplementation = dict[str, float]  # one value for "naive" and one for "efficient"


@dataclass(frozen=True)
class Comparison:
    """What the same network reaches and costs in both implementations."""

    accuracy: PerImplementation  # 0 to 1, of the held-out images
    step_ms: PerImplementation  # milliseconds per training step
    mib_per_image: PerImplementation  # MiB that each image of a training batch adds to the peak


def compare(checkpoint: Checkpoint, held_out: LabelledImages, batch_size: int, device: str) -> Comparison:
    """Put the trained weights into both implementations and measure both, in this run."""
    config, input_shape = checkpoint.model.config, checkpoint.preprocessing.input_shape
    models = {name: factory(**config).to(device) for name, factory in FACTORIES.items()}
    for model in models.values():
        model.load_state_dict(checkpoint.model.state_dict())
    batches = DataLoader(held_out, batch_size)
    accuracy = {name: evaluate(model, batches)[1] for name, model in models.items()}
    # Only now, since these steps train the models.
    steps = {name: make_step(model, input_shape, batch_size, device=device) for name, model in models.items()}
    return Comparison(accuracy, step_times(steps), peak_memory(config, input_shape, device))


def peak_memory(config: dict[str, Any], input_shape: tuple[int, int, int], device: str) -> PerImplementation:
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
