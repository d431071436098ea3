"""The affine map of a batch norm, from its statistics and parameters."""

import triton.language as tl
from torch import Tensor

from .launch import ceil_div, kernel, on_device

BLOCK = 256


@kernel()
def batch_norm_affine_kernel(mean, variance, weight, bias, affine, channels, EPS: tl.constexpr, CHANNELS: tl.constexpr):
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    present = channel < channels
    dtype = affine.dtype.element_ty
    centre = tl.load(mean + channel, mask=present, other=0.0).to(dtype)
    spread = tl.load(variance + channel, mask=present, other=1.0).to(dtype)
    rstd = 1.0 / tl.sqrt(spread + EPS)
    scale = tl.load(weight + channel, mask=present, other=0.0).to(dtype) * rstd
    shift = tl.fma(-centre, scale, tl.load(bias + channel, mask=present, other=0.0).to(dtype))
    tl.store(affine + channel, centre, mask=present)
    tl.store(affine + channels + channel, rstd, mask=present)
    tl.store(affine + 2 * channels + channel, scale, mask=present)
    tl.store(affine + 3 * channels + channel, shift, mask=present)


def batch_norm_affine(
    mean: Tensor,  # [C]
    variance: Tensor,  # [C]
    weight: Tensor,  # [C]
    bias: Tensor,  # [C]
    eps: float,
    affine: Tensor,  # [4, C]
) -> None:
    """affine = mean, ``rstd = 1 / sqrt(variance + eps)``, ``scale = weight * rstd``, ``shift``."""
    channels = affine.shape[1]
    mean, variance, weight, bias = (vector.contiguous() for vector in (mean, variance, weight, bias))
    with on_device(affine):
        batch_norm_affine_kernel[(ceil_div(channels, BLOCK),)](
            mean, variance, weight, bias, affine, channels, eps, BLOCK
        )
