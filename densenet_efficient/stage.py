"""What a stage is: a dense block together with the consumer of all its channels, its exit.

The exit is a transition, FC-DenseNet's transition down, the head, or nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from .batch_norm import Norm
from .kernels import spatial
from .layout import MEMORY_FORMATS, is_channels_last
from .synchronisation import Synchronisation

TRANSITION, TRANSITION_DOWN, HEAD, NO_EXIT = "transition", "transition down", "head", "none"


class Layer(NamedTuple):
    """One layer's tensors: BN-ReLU-conv1x1-BN-ReLU-conv3x3, or BN-ReLU-conv3x3 where the bottleneck's two are None.

    The last convolution may have any odd kernel sizes, in one to three dimensions, and a dilation.
    """

    norm1: Norm  # of C_l channels
    conv1: Tensor  # [K, C_l, 1, 1], or [k, C_l, 3, 3] without a bottleneck
    norm2: Norm | None  # of K channels
    conv2: Tensor | None  # [k, K, 3, 3]
    dilation: int  # of the last convolution
    dropout: Tensor | None  # [M, k], True where an output is kept

    @property
    def norms(self) -> list[Norm]:
        return [self.norm1] if self.norm2 is None else [self.norm1, self.norm2]

    @property
    def convolutions(self) -> list[Tensor]:
        return [self.conv1] if self.conv2 is None else [self.conv1, self.conv2]

    @property
    def growth_rate(self) -> int:
        """k, the channels that this layer adds."""
        return self.convolutions[-1].shape[0]


@dataclass
class Stage:
    """A dense block and its exit. The exit's norm and 1x1 convolution are None where it has none."""

    layers: list[Layer]
    exit: str
    exit_norm: Norm | None
    exit_conv: Tensor | None
    exit_dropout: Tensor | None  # [M, C'] of a transition down, True where its convolution's output is kept
    drop_rate: float
    synchronisation: Synchronisation | None = None

    @property
    def bottleneck_channels(self) -> int:
        """K, 0 without a bottleneck."""
        first = self.layers[0]
        return 0 if first.conv2 is None else first.conv1.shape[0]

    @property
    def norms(self) -> list[Norm]:
        """The layers', in order."""
        return [norm for layer in self.layers for norm in layer.norms]

    @property
    def convolutions(self) -> list[Tensor]:
        """The layers', in order."""
        return [convolution for layer in self.layers for convolution in layer.convolutions]

    @property
    def has_kernels_alone(self) -> bool:
        """Whether its layers are nothing but kernels: no dropout, no synchronised statistics, 3x3 convolutions."""
        return self.synchronisation is None and all(
            layer.dropout is None and spatial.has_kernel(layer.convolutions[-1], layer.dilation)
            for layer in self.layers
        )

    @property
    def needs_statistics(self) -> bool:
        """Whether any consumer of the storage normalises by the batch's statistics."""
        norms = [layer.norm1 for layer in self.layers] + ([self.exit_norm] if self.exit_norm else [])
        return any(norm.running is None for norm in norms)

    @property
    def input_channels(self) -> int:
        """C0, which the first layer reads."""
        return self.layers[0].norm1.weight.shape[0]

    def in_dtype(self, dtype: torch.dtype) -> Stage:
        """The same with the layers' convolutions in ``dtype`` and channels-last, all of them cast in one go."""
        weights = self.convolutions
        if all(weight.dtype == dtype and (weight.dim() == 3 or is_channels_last(weight)) for weight in weights):
            return self
        cast = [
            torch.empty_like(weight, dtype=dtype, memory_format=MEMORY_FORMATS.get(weight.dim(), torch.preserve_format))
            for weight in weights
        ]
        torch._foreach_copy_(cast, weights)
        remaining = iter(cast)
        layers = [
            layer._replace(conv1=next(remaining), conv2=None if layer.conv2 is None else next(remaining))
            for layer in self.layers
        ]
        return replace(self, layers=layers)

    def merge(self, mean: Tensor | None, variance: Tensor | None) -> None:
        """Makes statistics that were just taken those of all processes."""
        if self.synchronisation is not None and mean is not None and variance is not None:
            self.synchronisation.merge(mean, variance)


class StageOutput(NamedTuple):
    """What a forward leaves; all but ``out`` is kept for the backward."""

    out: Tensor  # [N, C', H // 2, W // 2] of either transition, [N, C] of a head, empty without an exit
    features: Tensor  # [N, C, H, W], or of one or three dimensions; a view of the storage
    statistics: Tensor  # [2, C]: mean and biased variance of every channel of the storage
    bottleneck_statistics: Tensor  # [L, 2, K]
    bottlenecks: list[Tensor]  # of [M, K], those of the last layers; the others are recomputed

    def bottleneck_of(self, layer: int) -> Tensor | None:
        """[M, K] of a layer, if it was saved."""
        recomputed = len(self.bottleneck_statistics) - len(self.bottlenecks)
        position = layer - recomputed
        return self.bottlenecks[position] if position >= 0 else None


class StageGradients(NamedTuple):
    """The gradients of a stage; None where not asked for."""

    input: Tensor | None
    layers: list[list[Tensor | None]]  # in the order of the layer's parameters
    exit: list[Tensor | None]


def pooling_window(stage_exit: str, size: spatial.Size) -> spatial.Size:
    """The window of the exit's pooling: 2 along each axis in either transition, the whole image in the head."""
    return size if stage_exit == HEAD else (2,) * len(size)
