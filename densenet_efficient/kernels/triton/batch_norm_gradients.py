"""What the sums of a batch norm's backward give: its weight's gradient, and its share of the projection."""

import triton.language as tl
from torch import Tensor

from .launch import ceil_div, kernel, on_device

BLOCK = 256


@kernel(do_not_specialize=["count"])
def batch_norm_gradients_kernel(
    sum_grad, sum_grad_x, rstd, scale, count, grad_weight, slope, offset, channels, CHANNELS: tl.constexpr
):  # fmt: skip
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    present = channel < channels
    sums_x = tl.load(sum_grad_x + channel, mask=present, other=0.0)
    inverse = tl.load(rstd + channel, mask=present, other=0.0)
    if grad_weight is not None:
        tl.store(grad_weight + channel, sums_x * inverse, mask=present)
    if slope is not None:
        share = tl.load(scale + channel, mask=present, other=0.0) / -tl.cast(count, sums_x.dtype)
        sums = tl.load(sum_grad + channel, mask=present, other=0.0)
        before = tl.load(offset + channel, mask=present, other=0.0)
        tl.store(offset + channel, tl.fma(share, sums, before), mask=present)
        before = tl.load(slope + channel, mask=present, other=0.0)
        tl.store(slope + channel, tl.fma(share * inverse * inverse, sums_x, before), mask=present)


def batch_norm_gradients(
    sum_grad: Tensor,  # [C]
    sum_grad_x: Tensor,  # [C]
    rstd: Tensor,  # [C]
    scale: Tensor,  # [C]
    count: int,
    grad_weight: Tensor | None,  # [C]
    slope: Tensor | None,  # [C]
    offset: Tensor | None,  # [C]
) -> None:
    """grad_weight = sum_grad_x * rstd; the projection's coefficients are added to ``slope`` and ``offset``."""
    channels = sum_grad.shape[0]
    with on_device(sum_grad):
        batch_norm_gradients_kernel[(ceil_div(channels, BLOCK),)](
            sum_grad, sum_grad_x, rstd, scale, count, grad_weight, slope, offset, channels, BLOCK
        )
