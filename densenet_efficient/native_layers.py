"""The loop of `dense_layers` in one native call, on the CPU's backend: the same operations, to the same bits.

Hundreds of small operations spend more time on their way through Python than the kernels do on small images.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import kernels
from .batch_norm import Projection
from .kernels import spatial
from .layout import as_rows
from .stage import Stage, StageOutput


def can_run(stage: Stage, backend: ModuleType, x: Tensor) -> bool:
    """Whether the native loop runs the layers of ``stage``."""
    return backend is kernels.cpu and stage.has_kernels_alone


def forward_layers(
    stage: Stage,
    backend: ModuleType,
    storage: Tensor,
    size: spatial.Size,
    statistics: Tensor,
    bottleneck_statistics: Tensor,
    saved_bottlenecks: int,
) -> list[Tensor]:
    """As `dense_layers.forward_layers`."""
    bottlenecks: list[Tensor] = torch.ops.densenet_efficient.dense_layers.default(
        storage, *size, statistics, stage.needs_statistics, bottleneck_statistics, *_flatten(stage), saved_bottlenecks
    )
    return bottlenecks


def backward_layers(
    stage: Stage,
    saved: StageOutput,
    grad: Tensor,
    projection: Projection,
    input_needed: bool,
    layers_needed: list[list[bool]],
) -> list[list[Tensor | None]]:
    """As `dense_layers.backward_layers`."""
    gradients = iter(
        torch.ops.densenet_efficient.dense_layers_backward.default(
            grad, as_rows(saved.features), *saved.features.shape[2:], saved.statistics, saved.bottleneck_statistics,
            saved.bottlenecks, *_flatten(stage), projection.slope, projection.offset, projection.is_empty,
            [flag for needed in layers_needed for flag in needed], input_needed,
        )
    )  # fmt: skip
    return [[next(gradients) for _ in needed] for needed in layers_needed]


def _flatten(stage: Stage) -> tuple[list[Any], ...]:
    """The layers' norms and convolutions as the operators take them."""
    norms = stage.norms
    return (
        [norm.weight for norm in norms],
        [norm.bias for norm in norms],
        [norm.eps for norm in norms],
        [statistic for norm in norms for statistic in norm.running or (None, None)],
        stage.convolutions,
    )
