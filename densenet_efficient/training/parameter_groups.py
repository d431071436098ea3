"""The parameters of a DenseNet as an optimizer's groups: head and stages, with and without weight decay; and back."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from densenet_efficient.models import EfficientDenseNet
from densenet_efficient.modules import DenseBlock

HEAD_GROUP = "head"
STAGE = re.compile(r"stage \d+")  # the name of a group of weights


def parameter_groups(
    model: EfficientDenseNet, learning_rate: float, layer_decay: float, decay_norms: bool
) -> list[dict[str, Any]]:
    """Groups whose names begin with `HEAD_GROUP` or "stage N".

    The learning rate of a stage is `layer_decay` times that of the next one.

    Gammas, betas and biases have groups of their own, without weight decay unless `decay_norms`.
    """
    blocks = [index for index, module in enumerate(model.features) if isinstance(module, DenseBlock)]
    stage_of = {}
    for index, module in enumerate(model.features):
        stage = sum(block <= index for block in blocks)  # 0 is the stem; a transition goes with its block
        stage_of.update(dict.fromkeys(module.parameters(), stage))
    groups = []
    for stage in range(len(blocks) + 1):
        members = [parameter for parameter, number in stage_of.items() if number == stage]
        rate = learning_rate * layer_decay ** (len(blocks) + 1 - stage)
        groups += _with_and_without_decay(f"stage {stage}", members, rate, decay_norms)
    return groups + _with_and_without_decay(HEAD_GROUP, list(model.classifier.parameters()), learning_rate, decay_norms)


def _with_and_without_decay(
    name: str, parameters: list[nn.Parameter], rate: float, decay_norms: bool
) -> list[dict[str, Any]]:
    if decay_norms:
        return [{"name": name, "params": parameters, "lr": rate}]
    weights = [parameter for parameter in parameters if parameter.dim() > 1]
    others = [parameter for parameter in parameters if parameter.dim() <= 1]
    groups = [
        {"name": name, "params": weights, "lr": rate},
        {"name": f"{name}, without decay", "params": others, "lr": rate, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def options_of(groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The options that groups of `parameter_groups` were made of, as far as they show; rates as at the peak."""
    options: dict[str, Any] = {"optimizer": _optimizer_of(groups[0])}
    stages = [group for group in groups if STAGE.fullmatch(group.get("name", ""))]
    heads = [group for group in groups if group.get("name") == HEAD_GROUP and "initial_lr" in group]
    if not stages or not heads:
        return options
    head = heads[0]
    options["learning_rate"] = head["initial_lr"]
    options["weight_decay"] = stages[0]["weight_decay"]  # that of the head is another while it is trained alone
    options["layer_decay"] = stages[-1]["initial_lr"] / head["initial_lr"]
    options["decay_norms"] = len(groups) == len(stages) + len(heads)
    if "momentum" in head:
        options["momentum"] = head["momentum"]
    return options


def _optimizer_of(group: Mapping[str, Any]) -> str:
    """Which --model.optimizer such a group is of."""
    if "momentum" in group:
        return "sgd"
    return "adamw" if group["decoupled_weight_decay"] else "adam"
