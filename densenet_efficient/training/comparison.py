"""Naive against efficient, measured: accuracy with the same weights, time per step, peak memory per image."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from densenet_efficient.measure import make_step, peak_memory_per_image, step_times
from densenet_efficient.models import EfficientDenseNet, cifar_densenet
from densenet_efficient.reference import NaiveDenseNet
from densenet_efficient.training.checkpoint import Checkpoint
from densenet_efficient.training.data import LabelledImages
from densenet_efficient.training.loop import evaluate

FACTORIES: dict[str, Callable[..., nn.Module]] = {"naive": NaiveDenseNet, "efficient": EfficientDenseNet}
CURVE_GROWTH_RATE = 12
CURVE_INPUT_SHAPE = (3, 32, 32)  # CIFAR, for which the paper has the DenseNets of many depths

PerImplementation = dict[str, float]  # one value for "naive" and one for "efficient"


@dataclass(frozen=True)
class Comparison:
    """What the same network costs and reaches in both implementations."""

    accuracy: PerImplementation  # 0 to 1, of the held-out images
    step_ms: PerImplementation  # milliseconds per training step
    mib_per_image: PerImplementation  # MiB that an image of a training batch adds to the peak


def compare(checkpoint: Checkpoint, held_out: LabelledImages, batch_size: int, device: str) -> Comparison:
    """Put the trained weights into both implementations and measure both in this run."""
    config, shape = checkpoint.model.config, checkpoint.preprocessing.input_shape
    models = {name: _with_weights(factory(**config), checkpoint.model) for name, factory in FACTORIES.items()}
    accuracy = {
        name: evaluate(model.to(device), DataLoader(held_out, batch_size))[1] for name, model in models.items()
    }
    steps = {name: make_step(model, shape, batch_size, device=device) for name, model in models.items()}
    return Comparison(accuracy, step_times(steps), peak_memory(config, shape, device))


def peak_memory(config: dict[str, Any], input_shape: tuple[int, int, int], device: str) -> PerImplementation:
    """MiB per image of a training step. The smaller the images, the more of them, to rise above the noise."""
    batches = (8, 24) if input_shape[-1] >= 32 else (32, 96)
    return {
        name: peak_memory_per_image(f"{factory.__module__}:{factory.__qualname__}", config, input_shape, batches, device=device)
        for name, factory in FACTORIES.items()
    }


def memory_against_depth(depths: Iterable[int], checkpointing: str, device: str) -> dict[int, PerImplementation]:
    """`peak_memory` of the DenseNet-BC of growth rate 12 for 32x32 images, at each of `depths`."""
    configs = {
        depth: cifar_densenet(depth, CURVE_GROWTH_RATE, checkpointing=checkpointing).config for depth in depths
    }
    return {depth: peak_memory(config, CURVE_INPUT_SHAPE, device) for depth, config in configs.items()}


def _with_weights(model: nn.Module, source: nn.Module) -> nn.Module:
    with torch.no_grad():
        model.load_state_dict(source.state_dict())
    return model
