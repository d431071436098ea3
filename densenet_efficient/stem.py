"""The stem: 7x7 convolution, batch norm, ReLU and 3x3 maximum pooling, with its recomputing backward.

It keeps its input and, unless it recomputes, the convolution's output; never an arg-max (autograd keeps it in int64).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import kernels
from .batch_norm import BatchNorm, Projection
from .dense_block import as_images, as_rows, empty_images
from .synchronisation import Synchronisation

IMAGES_AT_A_TIME = {"cpu": 4}  # by type of device, in the convolution's backward; else the whole batch


class Stem(NamedTuple):
    """The stem's convolution and norm; the pooling is the 3x3, stride 2, padding 1 of the paper."""

    conv: Tensor  # [C, in_channels, kh, kw]
    stride: list[int]
    padding: list[int]
    norm: BatchNorm
    synchronisation: Synchronisation | None = None


class StemOutput(NamedTuple):
    """What a forward leaves; all but ``out`` is kept for the backward."""

    out: Tensor  # [N, C, H', W']
    statistics: Tensor  # [2, C]
    conv_out: Tensor  # [N, C, H, W], empty where it is recomputed


def pooled_size(size: int) -> int:
    """The size after a 3x3 pooling of stride 2 and padding 1."""
    return (size - 1) // 2 + 1


def forward_stem(stem: Stem, x: Tensor, save_conv: bool) -> StemOutput:
    """Runs the stem on ``x`` [N, in_channels, H, W]."""
    backend = kernels.backend_for(x.device)
    conv_out = _convolve(stem, x)
    height, width = conv_out.shape[2:]
    rows = as_rows(conv_out)
    statistics = x.new_zeros(2, rows.shape[1], dtype=kernels.accumulation_dtype(x.dtype))
    if stem.norm.running is None:
        backend.channel_stats(rows, *statistics)
        if stem.synchronisation is not None:
            stem.synchronisation.merge(*statistics)
    affine = stem.norm.affine(backend, *statistics)
    out = empty_images(x, x.shape[0], rows.shape[1], pooled_size(height), pooled_size(width))
    backend.bn_relu_max_pool(rows, affine.scale, affine.shift, height, width, as_rows(out))
    return StemOutput(out, statistics, conv_out if save_conv else x.new_empty(0))


def backward_stem(
    stem: Stem, out_grad: Tensor, x: Tensor, saved: StemOutput, needed: list[bool]
) -> list[Tensor | None]:
    """The gradients of (input, convolution weight, norm weight, norm bias), None where not needed."""
    backend = kernels.backend_for(x.device)
    conv_out = saved.conv_out if saved.conv_out.numel() else _convolve(stem, x)
    height, width = conv_out.shape[2:]
    rows = as_rows(conv_out)
    affine = stem.norm.affine(backend, *saved.statistics)
    grad = torch.empty_like(rows)
    sum_grad, sum_grad_x = torch.empty_like(affine.mean), torch.empty_like(affine.mean)
    backend.bn_relu_max_pool_backward(
        as_rows(out_grad).contiguous(),
        rows,
        affine.mean,
        affine.scale,
        affine.shift,
        height,
        width,
        grad,
        sum_grad,
        sum_grad_x,
    )
    projection = Projection(backend, rows.shape[1], affine.mean, stem.synchronisation)
    norm_grad = projection.add(stem.norm, affine, sum_grad, sum_grad_x, rows.shape[0])
    projection.apply(grad, rows, affine.mean, 0, rows.shape[1])
    del rows, conv_out
    conv_grads = _backward_convolution(stem, as_images(grad, height, width), x, needed[:2])
    return [*conv_grads, norm_grad, sum_grad]


def _backward_convolution(stem: Stem, grad: Tensor, x: Tensor, needed: list[bool]) -> list[Tensor | None]:
    """The gradients of (input, weight), on the CPU a few images at a time.

    There torch's convolution turns the images and the gradient of a first layer into layouts of its own, which takes
    twice the memory of the gradient: for a whole batch that would be the peak of the step.
    """
    input_grad = torch.empty_like(x, memory_format=torch.channels_last) if needed[0] else None
    conv_grad = stem.conv.new_zeros(stem.conv.shape, dtype=kernels.accumulation_dtype(x.dtype)) if needed[1] else None
    weight = _channels_last(stem.conv.to(x.dtype))
    at_a_time = IMAGES_AT_A_TIME.get(x.device.type, max(x.shape[0], 1))
    for start in range(0, x.shape[0] if any(needed) else 0, at_a_time):
        images = slice(start, start + at_a_time)
        input_part, conv_part, _ = torch.ops.aten.convolution_backward(
            grad[images], _channels_last(x[images]), weight, None,
            stem.stride, stem.padding, [1, 1], False, [0, 0], 1, [*needed, False],
        )  # fmt: skip
        if input_grad is not None:
            input_grad[images] = input_part
        if conv_grad is not None:
            conv_grad += conv_part
    return [input_grad, conv_grad]


def _convolve(stem: Stem, x: Tensor) -> Tensor:
    """The convolution's output in channels-last, which is what the pooling reads as rows."""
    weight = _channels_last(stem.conv.to(x.dtype))
    out = torch.conv2d(_channels_last(x), weight, None, stem.stride, stem.padding)
    return _channels_last(out)


def _channels_last(images: Tensor) -> Tensor:
    return images.contiguous(memory_format=torch.channels_last)
