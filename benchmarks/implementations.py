"""The networks under comparison, all built from one configuration."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torchvision
from torch import nn

from densenet_efficient import EfficientDenseNet
from densenet_efficient.models import create_model
from densenet_efficient.reference import NaiveDenseNet

from .runtimes import ExportedNetwork, onnxruntime_run, openvino_run

TINY = {"growth_rate": 8, "block_config": (2, 2), "num_init_features": 16, "num_classes": 10}
TORCHVISION_ARGUMENTS = (
    "growth_rate",
    "block_config",
    "num_init_features",
    "bn_size",
    "drop_rate",
    "num_classes",
)


def build(implementation: str, model: str) -> nn.Module:
    """The network `model` ("tiny" or a name of `create_model`) as `implementation` builds it.

    Raises ValueError for an unknown name, and for a network that the implementation does not have.
    """
    if implementation not in IMPLEMENTATIONS:
        known = ", ".join(IMPLEMENTATIONS)
        raise ValueError(f"unknown implementation {implementation!r}; expected one of {known}")
    return IMPLEMENTATIONS[implementation](configuration(model))


def configuration(model: str) -> dict[str, Any]:
    """The arguments of `EfficientDenseNet` that give `model`, which may also be "tiny"."""
    with torch.device("meta"):
        return dict((EfficientDenseNet(**TINY) if model == "tiny" else create_model(model)).config)  # type: ignore[arg-type]


def _torchvision(config: dict[str, Any], memory_efficient: bool = False) -> nn.Module:
    if config["small_inputs"] or not config["bottleneck"] or config["compression"] != 0.5:
        raise ValueError("torchvision has only DenseNet-BC with the ImageNet stem; leave its implementations out")
    arguments = {name: config[name] for name in TORCHVISION_ARGUMENTS}
    return torchvision.models.DenseNet(**arguments, memory_efficient=memory_efficient)


def _compile(config: dict[str, Any], **options: Any) -> nn.Module:
    return cast(nn.Module, torch.compile(_torchvision(config), dynamic=False, **options))


def _half_the_activation_memory(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
    # A backend of its own keeps the setting out of the plain compilation beside it in this process.
    from torch._functorch import config
    from torch._inductor.compile_fx import compile_fx

    with config.patch(activation_memory_budget=0.5):
        return compile_fx(graph, inputs)


def _ours(config: dict[str, Any], checkpointing: str) -> nn.Module:
    return EfficientDenseNet(**config | {"checkpointing": checkpointing})


IMPLEMENTATIONS: dict[str, Callable[[dict[str, Any]], nn.Module]] = {
    "naive": lambda config: NaiveDenseNet(**config),
    "torchvision": _torchvision,
    "torchvision-checkpoint": lambda config: _torchvision(config, memory_efficient=True),
    "compile": lambda config: _compile(config, backend="inductor"),
    "compile-budget-0.5": lambda config: _compile(config, backend=_half_the_activation_memory),
    "compile-max-autotune": lambda config: _compile(config, mode="max-autotune"),
    "onnxruntime": lambda config: ExportedNetwork(_torchvision(config), onnxruntime_run),
    "openvino": lambda config: ExportedNetwork(_torchvision(config), openvino_run),
    "ours-none": lambda config: _ours(config, "none"),
    "ours-bottleneck": lambda config: _ours(config, "bottleneck"),
}
