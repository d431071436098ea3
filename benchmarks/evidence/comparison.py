"""DenseNets, naive and efficient, beside other networks: size, work, memory, throughput, published accuracy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from .. import results as results_file
from ..cells import Cell, Variant
from ..implementations import build
from .steps import Pair, measure_steps

BATCH = 8
ROUNDS = 5
DENSENETS = ("densenet121", "densenet201")
OTHERS = ("resnet50", "efficientnet_b4", "convnext_tiny")
IMPLEMENTATIONS = ("torchvision", "ours-none", "ours-bottleneck")
SIZE, EFFICIENTNET_SIZE = 224, 380  # the second is that of EfficientNet-B4's published accuracy
# torchvision publishes weights of all of them, evaluated alike; those of the original recipes and the newest.
WEIGHTS = {
    "densenet121": ("DenseNet121_Weights.IMAGENET1K_V1",),
    "densenet201": ("DenseNet201_Weights.IMAGENET1K_V1",),
    "resnet50": ("ResNet50_Weights.IMAGENET1K_V1", "ResNet50_Weights.IMAGENET1K_V2"),
    "efficientnet_b4": ("EfficientNet_B4_Weights.IMAGENET1K_V1",),
    "convnext_tiny": ("ConvNeXt_Tiny_Weights.IMAGENET1K_V1",),
}


def measure(path: Path) -> None:
    """Count and look up what needs no measuring, and measure what ``path`` does not hold yet."""
    results = results_file.load(path, results_file.describe_machine())
    results["networks"] = [describe(*network) for network in networks()]
    results_file.save(path, results)
    measure_steps(path, plan(), ROUNDS)


def networks() -> list[tuple[str, int]]:
    """The names of the networks, with the size of their images."""
    return [(model, SIZE) for model in (*DENSENETS, *OTHERS)] + [("efficientnet_b4", EFFICIENTNET_SIZE)]


def plan() -> list[Pair]:
    """Every network in training and inference; those of timm in both layouts, since neither is always the faster."""
    pairs = []
    for model, size in networks():
        for task in ("train", "infer"):
            cell = Cell(task, model, "float32", BATCH, size)
            pairs += [(cell, variant) for variant in variants_of(model, task)]
    return pairs


def variants_of(model: str, task: str) -> list[Variant]:
    if model in OTHERS:
        return [Variant("timm", layout) for layout in ("channels-last", "contiguous")]
    return [
        Variant(implementation, "channels-last")
        for implementation in IMPLEMENTATIONS
        if (task, implementation) != ("infer", "ours-bottleneck")
    ]


def describe(model: str, size: int) -> dict[str, Any]:
    """Parameters, multiply-adds of one image, and what torchvision publishes of its weights."""
    with torch.device("meta"):
        network = build("torchvision" if model in DENSENETS else "timm", model)
    return {
        "model": model,
        "size": size,
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "multiply_adds": multiply_adds(network, size),
        "weights": [published(name) for name in WEIGHTS[model]],
    }


def multiply_adds(network: nn.Module, size: int) -> int:
    """Of the convolutions and matrix products of a network on the meta device."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network.eval()(torch.empty(1, 3, size, size, device="meta"))
    return int(counter.get_total_flops()) // 2


def published(name: str) -> dict[str, Any]:
    """ImageNet's top-1 accuracy in percent as torchvision publishes it with these weights."""
    weights = torchvision.models.get_weight(name)
    return {
        "name": name,
        "top1": weights.meta["_metrics"]["ImageNet-1K"]["acc@1"],
        "size": weights.transforms().crop_size[0],
        "source": weights.meta["recipe"],
    }
