"""torch's classes of each kind for one, two and three spatial dimensions."""

from __future__ import annotations

from typing import TypeAlias

import torch.nn.functional as F
from torch import Tensor, nn

BatchNorm: TypeAlias = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm
Convolution: TypeAlias = nn.Conv1d | nn.Conv2d | nn.Conv3d
MaxPool: TypeAlias = nn.MaxPool1d | nn.MaxPool2d | nn.MaxPool3d
AvgPool: TypeAlias = nn.AvgPool1d | nn.AvgPool2d | nn.AvgPool3d

BATCH_NORMS: dict[int, type[BatchNorm]] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
CONVOLUTIONS: dict[int, type[Convolution]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
MAX_POOLS: dict[int, type[MaxPool]] = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}
AVG_POOLS: dict[int, type[AvgPool]] = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}
_GLOBAL_AVERAGES = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}
AXES = {1: "L", 2: "H, W", 3: "D, H, W"}  # as error messages name them


_DIMS: dict[type, int] = {
    kind: dims for kinds in (BATCH_NORMS, CONVOLUTIONS, MAX_POOLS, AVG_POOLS) for dims, kind in kinds.items()
}


def is_for(norm: BatchNorm, dims: int) -> bool:
    """Whether ``norm`` is for ``dims`` spatial dimensions, as a synchronised one is for any."""
    return isinstance(norm, nn.SyncBatchNorm) or dims_of(norm) == dims


def dims_of(module: BatchNorm | Convolution | MaxPool | AvgPool) -> int:
    """The number of spatial dimensions that ``module``, no synchronised norm, is for."""
    dims = _DIMS.get(type(module))  # of a subclass, that of its base
    return dims or next(_DIMS[base] for base in type(module).__mro__ if base in _DIMS)


def global_average(features: Tensor, spatial_dims: int) -> Tensor:
    """relu(features) averaged over each image, [N, C, ...] to [N, C], by the operations of torchvision's DenseNet."""
    average: Tensor = _GLOBAL_AVERAGES[spatial_dims](F.relu(features), 1)
    return average.flatten(1)
