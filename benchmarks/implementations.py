"""The networks under comparison, all built from one configuration."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any, cast

import torch
import torchvision
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torchvision.models.densenet import _DenseBlock

from densenet_efficient import EfficientDenseNet
from densenet_efficient.models import cifar_densenet, create_model
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

    "timm" builds any model that timm has, for a comparison between networks.

    Raises ValueError for an unknown name, and for a network that the implementation does not have.
    """
    if implementation == "timm":
        import timm

        return timm.create_model(model)
    if implementation not in IMPLEMENTATIONS:
        known = ", ".join(IMPLEMENTATIONS)
        raise ValueError(f"unknown implementation {implementation!r}; expected one of {known}")
    return IMPLEMENTATIONS[implementation](configuration(model))


def configuration(model: str) -> dict[str, Any]:
    """The arguments of `EfficientDenseNet` that give `model`.

    That is "tiny", a name of `create_model`, or "densenet-bc-DEPTH-GROWTH" of any depth for small images.
    """
    with torch.device("meta"):
        if model == "tiny":
            return dict(EfficientDenseNet(**TINY).config)  # type: ignore[arg-type]
        if match := re.fullmatch(r"densenet-bc-(\d+)-(\d+)", model):
            return dict(cifar_densenet(int(match[1]), int(match[2])).config)
        return dict(create_model(model).config)


def factory_of(implementation: str, model: str) -> tuple[str, dict[str, Any]]:
    """The class of "torchvision" or of ours as "module:class", and its arguments for what `build` gives.

    A process that builds it so imports nothing else.
    """
    config = configuration(model)
    if implementation == "torchvision":
        return "torchvision.models:DenseNet", _torchvision_arguments(config)
    return "densenet_efficient:EfficientDenseNet", config | {"checkpointing": implementation.removeprefix("ours-")}


def _torchvision_arguments(config: dict[str, Any]) -> dict[str, Any]:
    if config["small_inputs"] or not config["bottleneck"] or config["compression"] != 0.5:
        raise ValueError("torchvision has only DenseNet-BC with the ImageNet stem; leave its implementations out")
    return {name: config[name] for name in TORCHVISION_ARGUMENTS}


def _torchvision(config: dict[str, Any], memory_efficient: bool = False) -> nn.Module:
    return torchvision.models.DenseNet(**_torchvision_arguments(config), memory_efficient=memory_efficient)


def _compile(config: dict[str, Any], **options: Any) -> nn.Module:
    return cast(nn.Module, torch.compile(_torchvision(config), dynamic=False, **options))


def _within_budget(budget: float) -> Callable[..., Any]:
    """torch.compile's backend that keeps this share of the activations, from 1.0 (the default) to 0.0."""

    # A backend of its own keeps the setting out of the plain compilation beside it in this process.
    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        from torch._functorch import config
        from torch._inductor.compile_fx import compile_fx

        with config.patch(activation_memory_budget=budget):
            return compile_fx(graph, inputs)

    return backend


def _checkpointed_blocks(config: dict[str, Any], **options: Any) -> nn.Module:
    """torchvision's network, each dense block of which is recomputed in the backward."""
    network = _torchvision(config)
    for module in network.modules():
        if isinstance(module, _DenseBlock):
            module.forward = functools.partial(checkpoint, module.forward, use_reentrant=False, **options)
    return network


def _keep_convolutions(context: Any, operation: Any, *arguments: Any, **options: Any) -> CheckpointPolicy:
    """Selective checkpointing: concatenations, norms and ReLUs are recomputed, convolutions are not."""
    if operation is torch.ops.aten.convolution.default:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def _ours(config: dict[str, Any], checkpointing: str) -> nn.Module:
    return EfficientDenseNet(**config | {"checkpointing": checkpointing})


IMPLEMENTATIONS: dict[str, Callable[[dict[str, Any]], nn.Module]] = {
    "naive": lambda config: NaiveDenseNet(**config),
    "torchvision": _torchvision,
    "torchvision-checkpoint": lambda config: _torchvision(config, memory_efficient=True),
    "block-checkpoint": _checkpointed_blocks,
    "selective-checkpoint": lambda config: _checkpointed_blocks(
        config, context_fn=functools.partial(create_selective_checkpoint_contexts, _keep_convolutions)
    ),
    "compile": lambda config: _compile(config, backend="inductor"),
    "compile-budget-0.5": lambda config: _compile(config, backend=_within_budget(0.5)),
    "compile-budget-0.0": lambda config: _compile(config, backend=_within_budget(0.0)),
    "compile-max-autotune": lambda config: _compile(config, mode="max-autotune"),
    "onnxruntime": lambda config: ExportedNetwork(_torchvision(config), onnxruntime_run),
    "openvino": lambda config: ExportedNetwork(_torchvision(config), openvino_run),
    "ours-none": lambda config: _ours(config, "none"),
    "ours-bottleneck": lambda config: _ours(config, "bottleneck"),
}
