"""One batch norm as a consumer of shared statistics: its affine map, its gradients, its share of the projection."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import kernels


class BatchNorm(NamedTuple):
    """What one batch norm brings to an operator, without its module."""

    weight: Tensor  # [C], gamma
    bias: Tensor  # [C], beta
    eps: float
    running: tuple[Tensor, Tensor] | None  # (mean, variance), [C] each, where they are used instead of the batch's

    def affine(self, batch_mean: Tensor, batch_variance: Tensor) -> Affine:
        """The map of this norm, given the batch's statistics [C] (ignored by a norm that uses its running ones)."""
        dtype = batch_mean.dtype
        mean, variance = self.running or (batch_mean, batch_variance)
        mean = mean.to(dtype)
        rstd = torch.rsqrt(variance.to(dtype) + self.eps)
        scale = self.weight.to(dtype) * rstd
        return Affine(mean, rstd, scale, torch.addcmul(self.bias.to(dtype), mean, scale, value=-1))


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

    def __init__(self, channels: int, like: Tensor) -> None:
        self.slope = like.new_zeros(channels)
        self.offset = like.new_zeros(channels)
        self.is_empty = True  # then the batch's statistics may not even have been taken

    def add(self, norm: BatchNorm, affine: Affine, sum_grad: Tensor, sum_grad_x: Tensor, count: int) -> None:
        """Adds one consumer of the first C' channels; a norm with running statistics adds nothing."""
        if norm.running is not None:
            return
        self.is_empty = False
        channels = sum_grad.shape[0]
        self.offset[:channels].addcmul_(affine.scale, sum_grad, value=-1 / count)
        self.slope[:channels].addcmul_(affine.scale * affine.rstd.square(), sum_grad_x, value=-1 / count)

    def apply(self, grad: Tensor, x: Tensor, mean: Tensor, start: int, stop: int) -> None:
        """Corrects the gradient [M, stop - start] of the channels ``start`` to ``stop``, in place."""
        if self.is_empty:
            return
        channels = slice(start, stop)
        backend = kernels.backend_for(x.device)
        backend.project_gradient(grad, x, mean[channels], self.slope[channels], self.offset[channels])
