"""The operations that join neighbouring pixels, in one, two and three dimensions, over any backend of the contract.

The kernels know planes of height and width. A 1D signal is a plane of height 1, a volume is a stack of planes:

- pooling: its planes by the kernel, then along the depth what is left of them (a quarter);
- a convolution that is not 3x3 (other dimensions, kernel sizes or dilations): relu(x * scale + shift) of this one layer
  exists for as long as torch's convolution needs it. The kernels write it, and take its gradient apart: pooling with a
  window of one pixel is just that.

``size`` is (L,), (H, W) or (D, H, W); all else follows the contract of `densenet_efficient.kernels`. The convolution's
result does not depend on the number of threads where torch's does not.
"""

from __future__ import annotations

import math
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import products
from ..layout import as_images, as_rows

Size = tuple[int, ...]

ALONG_DEPTH = ([3, 1], [2, 1], [1, 0])  # window, stride and padding of a pooling of [N, 1, D, H' * W' * C]


def has_kernel(weight: Tensor, dilation: int) -> bool:
    """Whether a convolution with ``weight`` is the 3x3 one that the backends have kernels for."""
    return tuple(weight.shape[2:]) == (3, 3) and dilation == 1


def bn_relu_conv(
    backend: ModuleType,
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    weight: Tensor,
    size: Size,
    dilation: int,
    out: Tensor,
    mean: Tensor | None,
    variance: Tensor | None,
) -> None:
    """out [M, K] = conv(relu(x * scale + shift)) of unchanged size, and the statistics of ``out``."""
    if has_kernel(weight, dilation):
        backend.bn_relu_conv3x3(x, scale, shift, weight, *size, out, mean, variance)
        return
    activation = as_images(_activate(backend, x, scale, shift, size), *size)
    out.copy_(as_rows(products.convolve(activation, weight.to(x.dtype), _geometry(weight, dilation))))
    if mean is not None and variance is not None:
        backend.channel_stats(out, mean, variance)


def bn_relu_conv_backward(
    backend: ModuleType,
    out_grad: Tensor,
    x: Tensor,
    mean: Tensor,
    scale: Tensor,
    shift: Tensor,
    weight: Tensor,
    size: Size,
    dilation: int,
    grad: Tensor | None,
    accumulate: bool,
    grad_weight: Tensor | None,
    sum_grad: Tensor | None,
    sum_grad_x: Tensor | None,
) -> None:
    """Backward of `bn_relu_conv` for ``out_grad`` [M, K]."""
    if has_kernel(weight, dilation):
        backend.bn_relu_conv3x3_backward(
            out_grad, x, mean, scale, shift, weight, *size, grad, accumulate, grad_weight, sum_grad, sum_grad_x
        )
        return
    activation = as_images(_activate(backend, x, scale, shift, size), *size)
    x_grad, weight_grad = products.convolve_backward(
        as_images(out_grad, *size), activation, weight.to(x.dtype), _geometry(weight, dilation),
        [sum_grad is not None, grad_weight is not None],
    )  # fmt: skip
    if grad_weight is not None:
        grad_weight.copy_(weight_grad)
    if sum_grad is not None:
        backend.bn_relu_avg_pool_backward(
            as_rows(x_grad).to(x.dtype).contiguous(), x, mean, scale, shift, *_plane(size), 1, 1, grad, accumulate,
            sum_grad, sum_grad_x,
        )  # fmt: skip


def pooled_size(size: Size, window: Size) -> Size:
    """The number of windows along each axis; a rest is left out."""
    return tuple(length // step for length, step in zip(size, window, strict=True))


def bn_relu_avg_pool(
    backend: ModuleType, x: Tensor, scale: Tensor, shift: Tensor, size: Size, window: Size, out: Tensor
) -> None:
    """out [M', C]: means of relu(x * scale + shift) over windows side by side; a rest is left out."""
    size, window = _merge_whole(size, window)
    plane, tile = _plane(size), _plane(window)
    if len(size) < 3:
        backend.bn_relu_avg_pool(x, scale, shift, *plane, *tile, out)
        return
    in_planes = math.prod(pooled_size(plane, tile))
    planes = x.new_empty(x.shape[0] // math.prod(plane) * in_planes, x.shape[1])
    backend.bn_relu_avg_pool(x, scale, shift, *plane, *tile, planes)
    windows = planes.unflatten(0, (-1, size[0], in_planes))[:, : size[0] // window[0] * window[0]]
    out.copy_(windows.unflatten(1, (-1, window[0])).mean(2).flatten(0, 2))


def bn_relu_avg_pool_backward(
    backend: ModuleType,
    out_grad: Tensor,
    x: Tensor,
    mean: Tensor,
    scale: Tensor,
    shift: Tensor,
    size: Size,
    window: Size,
    grad: Tensor | None,
    accumulate: bool,
    sum_grad: Tensor,
    sum_grad_x: Tensor,
) -> None:
    """Backward of `bn_relu_avg_pool`; pixels outside every window get zero."""
    size, window = _merge_whole(size, window)
    plane, tile = _plane(size), _plane(window)
    if len(size) == 3:
        depth, in_planes = size[0], math.prod(pooled_size(plane, tile))
        spread = out_grad.unflatten(0, (-1, depth // window[0], in_planes)).repeat_interleave(window[0], 1) / window[0]
        out_grad = F.pad(spread, (0, 0, 0, 0, 0, depth - spread.shape[1])).flatten(0, 2)
    backend.bn_relu_avg_pool_backward(
        out_grad, x, mean, scale, shift, *plane, *tile, grad, accumulate, sum_grad, sum_grad_x
    )


def max_pooled_size(size: Size) -> Size:
    """The size after pooling with a window of 3, stride 2 and padding 1 along each axis."""
    return tuple((length - 1) // 2 + 1 for length in size)


def bn_relu_max_pool(backend: ModuleType, x: Tensor, scale: Tensor, shift: Tensor, size: Size, out: Tensor) -> None:
    """out [M', C]: maximum pooling of relu(x * scale + shift), window 3, stride 2, padding 1 along each axis."""
    if len(size) < 3:
        backend.bn_relu_max_pool(x, scale, shift, *_plane(size), out)
        return
    planes = _max_pooled_planes(backend, x, scale, shift, size)
    out.view(-1).copy_(F.max_pool2d(planes, *ALONG_DEPTH).flatten())


def bn_relu_max_pool_backward(
    backend: ModuleType,
    out_grad: Tensor,
    x: Tensor,
    mean: Tensor,
    scale: Tensor,
    shift: Tensor,
    size: Size,
    grad: Tensor,
    sum_grad: Tensor,
    sum_grad_x: Tensor,
) -> None:
    """Backward of `bn_relu_max_pool`; a window's gradient goes to its first maximum. ``grad`` is assigned."""
    if len(size) == 3:
        planes = _max_pooled_planes(backend, x, scale, shift, size)
        pooled, indices = F.max_pool2d(planes, *ALONG_DEPTH, return_indices=True)
        planes_grad = torch.ops.aten.max_pool2d_with_indices_backward(
            out_grad.view_as(pooled), planes, *ALONG_DEPTH, [1, 1], False, indices
        )
        out_grad = planes_grad.view(-1, x.shape[1])
    backend.bn_relu_max_pool_backward(out_grad, x, mean, scale, shift, *_plane(size), grad, sum_grad, sum_grad_x)


def _max_pooled_planes(backend: ModuleType, x: Tensor, scale: Tensor, shift: Tensor, size: Size) -> Tensor:
    """[N, 1, D, H' * W' * C]: every plane of a volume pooled."""
    height, width = max_pooled_size(size[1:])
    planes = x.new_empty(x.shape[0] // math.prod(size[1:]) * height * width, x.shape[1])
    backend.bn_relu_max_pool(x, scale, shift, *size[1:], planes)
    return planes.view(-1, 1, size[0], height * width * x.shape[1])


def _activate(backend: ModuleType, x: Tensor, scale: Tensor, shift: Tensor, size: Size) -> Tensor:
    """relu(x * scale + shift), [M, C] of its own."""
    activation = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    backend.bn_relu_avg_pool(x, scale, shift, *_plane(size), 1, 1, activation)
    return activation


def _geometry(weight: Tensor, dilation: int) -> products.Geometry:
    """Of a convolution that keeps the size, for odd kernel sizes."""
    sizes = weight.shape[2:]
    return products.geometry([1] * len(sizes), [dilation * (kernel // 2) for kernel in sizes], dilation)


def _plane(size: Size) -> tuple[int, int]:
    """Height and width of the planes that images of this size are made of."""
    return (1, size[0]) if len(size) == 1 else (size[-2], size[-1])


def _merge_whole(size: Size, window: Size) -> tuple[Size, Size]:
    """A window of the whole volume is one of a plane as high as all its planes together."""
    if len(size) == 3 and size == window:
        size = window = (size[0] * size[1], size[2])
    return size, window
