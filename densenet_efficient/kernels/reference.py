"""The formulas of the contract in plain torch: any device, any dtype, the oracle of every other backend.

The contract (shapes, strides, dtypes) stands in `densenet_efficient.kernels`. Nothing is fused here, so temporaries
as large as the operands come and go; what is *saved* between forward and backward is as small as with any backend.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..layout import as_images, as_rows


def channel_stats(x: Tensor, mean: Tensor, variance: Tensor) -> None:
    """Mean and biased variance of each column of ``x`` [M, C]; zero of no rows."""
    if x.shape[0] == 0:
        mean.zero_(), variance.zero_()
        return
    batch_variance, batch_mean = torch.var_mean(x.to(mean.dtype), dim=0, correction=0)
    mean.copy_(batch_mean)
    variance.copy_(batch_variance)


def write_with_statistics(x: Tensor, out: Tensor, mean: Tensor, variance: Tensor) -> None:
    """out [N*P, C] = the pixels of ``x`` [N, C, P], and the statistics of ``out``."""
    out.unflatten(0, (x.shape[0], x.shape[2])).copy_(x.transpose(1, 2))
    channel_stats(out, mean, variance)


def batch_norm_affine(mean: Tensor, variance: Tensor, weight: Tensor, bias: Tensor, eps: float, affine: Tensor) -> None:
    """affine [4, C]: the mean, ``rstd = 1 / sqrt(variance + eps)``, ``scale = weight * rstd``, ``shift``."""
    mean, variance = mean.to(affine.dtype), variance.to(affine.dtype)
    rstd = torch.rsqrt(variance + eps)
    scale = weight.to(affine.dtype) * rstd
    torch.stack([mean, rstd, scale, torch.addcmul(bias.to(affine.dtype), mean, scale, value=-1)], out=affine)


def batch_norm_gradients(
    sum_grad: Tensor,
    sum_grad_x: Tensor,
    rstd: Tensor,
    scale: Tensor,
    count: int,
    grad_weight: Tensor | None,
    slope: Tensor | None,
    offset: Tensor | None,
) -> None:
    """The gradient of one norm's weight, and its share of the projection, added to ``slope`` and ``offset``."""
    if grad_weight is not None:
        torch.mul(sum_grad_x, rstd, out=grad_weight)
    if slope is not None and offset is not None:
        offset.addcmul_(scale, sum_grad, value=-1 / count)
        slope.addcmul_(scale * rstd.square(), sum_grad_x, value=-1 / count)


def bn_relu_conv1x1(
    x: Tensor, scale: Tensor, shift: Tensor, weight: Tensor, out: Tensor, mean: Tensor | None, variance: Tensor | None
) -> None:
    """out [M, K] = relu(x * scale + shift) @ weight^T, and the statistics of ``out`` as stored."""
    out.copy_(_activate(x, scale, shift) @ weight.flatten(1).to(x.dtype).t())
    _stats_of(out, mean, variance)


def bn_relu_conv1x1_backward(
    out_grad: Tensor,
    out: Tensor,
    out_mean: Tensor,
    out_slope: Tensor,
    out_offset: Tensor,
    x: Tensor,
    mean: Tensor,
    scale: Tensor,
    shift: Tensor,
    weight: Tensor,
    grad: Tensor | None,
    grad_weight: Tensor | None,
    sum_grad: Tensor | None,
    sum_grad_x: Tensor | None,
) -> None:
    """Backward of `bn_relu_conv1x1`, adding into ``grad``.

    The gradient of ``out`` [M, K] is finished on load (the batch norm that follows it):
    ``out_grad + out_offset + (out - out_mean) * out_slope``.
    """
    finished = out_grad.to(mean.dtype) + out_offset + (out.to(mean.dtype) - out_mean) * out_slope
    finished = finished.to(x.dtype)
    activation = _activate(x, scale, shift)
    if grad_weight is not None:
        grad_weight.copy_((finished.t() @ activation).view_as(grad_weight))
    if sum_grad is not None and sum_grad_x is not None:
        _deposit(finished @ weight.flatten(1).to(x.dtype), activation, x, mean, scale, grad, True, sum_grad, sum_grad_x)


def bn_relu_conv3x3(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    weight: Tensor,
    height: int,
    width: int,
    out: Tensor,
    mean: Tensor | None,
    variance: Tensor | None,
) -> None:
    """out [M, K] = conv3x3(relu(x * scale + shift)), zero padding after the ReLU, and the statistics of ``out``."""
    images = as_images(_activate(x, scale, shift), height, width)
    out.copy_(as_rows(F.conv2d(images, weight.to(x.dtype), padding=1)))
    _stats_of(out, mean, variance)


def bn_relu_conv3x3_backward(
    out_grad: Tensor,
    x: Tensor,
    mean: Tensor,
    scale: Tensor,
    shift: Tensor,
    weight: Tensor,
    height: int,
    width: int,
    grad: Tensor | None,
    accumulate: bool,
    grad_weight: Tensor | None,
    sum_grad: Tensor | None,
    sum_grad_x: Tensor | None,
) -> None:
    """Backward of `bn_relu_conv3x3` for ``out_grad`` [M, K]."""
    activation = _activate(x, scale, shift)
    images = as_images(activation, height, width)
    image_grad, weight_grad, _ = torch.ops.aten.convolution_backward(
        as_images(out_grad, height, width),
        images,
        weight.to(x.dtype),
        None,
        [1, 1],
        [1, 1],
        [1, 1],
        False,
        [0, 0],
        1,
        [sum_grad is not None, grad_weight is not None, False],
    )
    if grad_weight is not None:
        grad_weight.copy_(weight_grad)
    if sum_grad is not None and sum_grad_x is not None:
        _deposit(as_rows(image_grad), activation, x, mean, scale, grad, accumulate, sum_grad, sum_grad_x)


def project_gradient(grad: Tensor, x: Tensor, mean: Tensor, slope: Tensor, offset: Tensor) -> None:
    """grad [M, C] += offset + (x - mean) * slope, in place: the batch norm's projection of all consumers at once."""
    grad.copy_(grad.to(mean.dtype) + offset + (x.to(mean.dtype) - mean) * slope)


def bn_relu_avg_pool(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    height: int,
    width: int,
    window_height: int,
    window_width: int,
    out: Tensor,
) -> None:
    """out [N*(H//wh)*(W//ww), C]: means of relu(x * scale + shift) over windows side by side; a rest is left out."""
    images = as_images(_activate(x, scale, shift).to(scale.dtype), height, width)
    out.copy_(as_rows(F.avg_pool2d(images, (window_height, window_width))))


def bn_relu_avg_pool_backward(
    out_grad: Tensor,
    x: Tensor,
    mean: Tensor,
    scale: Tensor,
    shift: Tensor,
    height: int,
    width: int,
    window_height: int,
    window_width: int,
    grad: Tensor | None,
    accumulate: bool,
    sum_grad: Tensor,
    sum_grad_x: Tensor,
) -> None:
    """Backward of `bn_relu_avg_pool`; pixels outside every window get zero."""
    shares = out_grad.to(mean.dtype) / (window_height * window_width)
    pooled = as_images(shares, height // window_height, width // window_width)
    spread = pooled.repeat_interleave(window_height, 2).repeat_interleave(window_width, 3)
    spread = F.pad(spread, (0, width - spread.shape[3], 0, height - spread.shape[2]))
    _deposit(as_rows(spread), _activate(x, scale, shift), x, mean, scale, grad, accumulate, sum_grad, sum_grad_x)


def bn_relu_max_pool(x: Tensor, scale: Tensor, shift: Tensor, height: int, width: int, out: Tensor) -> None:
    """out [N*H'*W', C]: 3x3 maximum pooling, stride 2, padding 1, of relu(x * scale + shift)."""
    images = as_images(_activate(x, scale, shift), height, width)
    out.copy_(as_rows(F.max_pool2d(images, 3, 2, 1)))


def bn_relu_max_pool_backward(
    out_grad: Tensor,
    x: Tensor,
    mean: Tensor,
    scale: Tensor,
    shift: Tensor,
    height: int,
    width: int,
    grad: Tensor,
    sum_grad: Tensor,
    sum_grad_x: Tensor,
) -> None:
    """Backward of `bn_relu_max_pool`; a window's gradient goes to its first maximum. ``grad`` is assigned."""
    activation = _activate(x, scale, shift)
    images = as_images(activation, height, width)
    _, indices = F.max_pool2d(images, 3, 2, 1, return_indices=True)
    pooled_height, pooled_width = (height - 1) // 2 + 1, (width - 1) // 2 + 1
    spread = torch.ops.aten.max_pool2d_with_indices_backward(
        as_images(out_grad, pooled_height, pooled_width), images, [3, 3], [2, 2], [1, 1], [1, 1], False, indices
    )
    _deposit(as_rows(spread), activation, x, mean, scale, grad, False, sum_grad, sum_grad_x)


def _activate(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """relu(x * scale + shift), computed in the dtype of ``scale`` and rounded to that of ``x``."""
    return torch.relu(torch.addcmul(shift, x.to(scale.dtype), scale)).to(x.dtype)


def _stats_of(out: Tensor, mean: Tensor | None, variance: Tensor | None) -> None:
    if mean is not None and variance is not None:
        channel_stats(out, mean, variance)


def _deposit(
    gradient: Tensor,
    activation: Tensor,
    x: Tensor,
    mean: Tensor,
    scale: Tensor,
    grad: Tensor | None,
    accumulate: bool,
    sum_grad: Tensor,
    sum_grad_x: Tensor,
) -> None:
    """Masks ``gradient`` by the ReLU, takes its sums, and leaves ``scale`` times it in ``grad``."""
    masked = torch.where(activation <= 0, 0, gradient.to(mean.dtype))
    torch.sum(masked, 0, out=sum_grad)
    torch.sum(masked * (x.to(mean.dtype) - mean), 0, out=sum_grad_x)
    if grad is None:
        return
    scaled = masked * scale
    grad.copy_(grad.to(scaled.dtype) + scaled if accumulate else scaled)
