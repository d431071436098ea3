"""One batch norm as a consumer of shared statistics: its affine map, its gradients, its share of the projection."""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from .synchronisation import Synchronisation


class Norm(NamedTuple):
    """What one batch norm brings to an operator, without its module."""

    weight: Tensor  # [C], gamma
    bias: Tensor  # [C], beta
    eps: float
    running: tuple[Tensor, Tensor] | None  # (mean, variance), [C] each, where they are used instead of the batch's

    def affine(self, backend: ModuleType, batch_mean: Tensor, batch_variance: Tensor) -> Affine:
        """The map of this norm, given the batch's statistics [C] (ignored by a norm that uses its running ones)."""
        mean, variance = self.running or (batch_mean, batch_variance)
        affine = batch_mean.new_empty(4, batch_mean.shape[0])
        backend.batch_norm_affine(mean, variance, self.weight, self.bias, self.eps, affine)
        return Affine(*affine.unbind())


class Affine(NamedTuple):
    """``x * scale + shift``, which is ``(x - mean) * rstd * gamma + beta``; all [C]."""

    mean: Tensor
    rstd: Tensor
    scale: Tensor
    shift: Tensor


class Projection:
    """The deferred part of the batch norm backward of C channels, summed over all their consumers.

    A batch norm's input gradient is ``scale * g - scale / M * (dbeta + (x - mean) * rstd * dgamma)``. The first term
    is added into the gradient buffer by each consumer; the second is linear in ``x - mean``, which all consumers share,
    so that only its two coefficients are summed here and the channels are corrected once, after their last consumer.
    """

    def __init__(
        self, backend: ModuleType, channels: int, like: Tensor, synchronisation: Synchronisation | None = None
    ) -> None:
        self.backend = backend
        self.synchronisation = synchronisation
        self.slope, self.offset = like.new_zeros(2, channels).unbind()
        self.is_empty = True  # then the batch's statistics may not even have been taken

    def add(self, norm: Norm, affine: Affine, sum_grad: Tensor, sum_grad_x: Tensor, count: int) -> Tensor:
        """Adds one consumer of the first C' channels, and returns the gradient of its weight [C'].

        A norm with running statistics has nothing to project.
        """
        slope = offset = None
        if norm.running is None:
            self.is_empty = False
            channels = sum_grad.shape[0]
            slope, offset = self.slope[:channels], self.offset[:channels]
        grad_weight = torch.empty_like(sum_grad)
        self.backend.batch_norm_gradients(
            sum_grad, sum_grad_x, affine.rstd, affine.scale, self._divisor(count), grad_weight, slope, offset
        )
        return grad_weight

    def synchronise(self, channels: slice) -> None:
        """Makes the coefficients of these channels those of all processes; once, after their last consumer."""
        if self.synchronisation is not None and not self.is_empty:
            self.synchronisation.average(self.slope[channels], self.offset[channels])

    def _divisor(self, count: int) -> int:
        """Of the sums: the values per channel, unless the division comes with the synchronisation.

        Without values the sums are zero, and stay so.
        """
        return max(count, 1) if self.synchronisation is None else 1

    def apply(self, grad: Tensor, x: Tensor, mean: Tensor, start: int, stop: int) -> None:
        """Corrects the gradient [M, stop - start] of the channels ``start`` to ``stop``, in place."""
        if self.is_empty:
            return
        channels = slice(start, stop)
        self.synchronise(channels)
        self.backend.project_gradient(grad, x, mean[channels], self.slope[channels], self.offset[channels])
