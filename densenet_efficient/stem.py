"""The stem: 7x7 convolution, batch norm, ReLU and 3x3 maximum pooling, with its recomputing backward.

It keeps its input and, unless it recomputes, the convolution's output; never an arg-max (autograd keeps it in int64).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import kernels, products
from .batch_norm import Norm, Projection
from .kernels import spatial
from .layout import as_images, as_rows, channels_last
from .synchronisation import Synchronisation

# Of the convolution's output, on the CPU; at least one image.
PIXELS_AT_A_TIME = 2**12
# Above about 1300x1300, oneDNN has only its reference loops for a weight's gradient.
PIXELS_OF_A_BAND = 2**20


class Stem(NamedTuple):
    """The stem's convolution and norm; the pooling is the 3x3, stride 2, padding 1 of the paper."""

    conv: Tensor  # [C, in_channels, kh, kw], or of one or three dimensions, as all here
    stride: list[int]
    padding: list[int]
    norm: Norm
    synchronisation: Synchronisation | None = None

    @property
    def geometry(self) -> products.Geometry:
        return products.geometry(self.stride, self.padding, dilation=1)

    def output_size(self, size: Sequence[int]) -> spatial.Size:
        """The convolution's, of an input of ``size``."""
        axes = zip(size, self.conv.shape[2:], self.stride, self.padding, strict=True)
        return tuple((length + 2 * pad - kernel) // step + 1 for length, kernel, step, pad in axes)


class StemOutput(NamedTuple):
    """What a forward leaves; all but ``out`` is kept for the backward."""

    out: Tensor  # [N, C, H', W']
    statistics: Tensor  # [2, C]
    conv_out: Tensor  # [N, C, H, W], empty where it is recomputed


def forward_stem(stem: Stem, x: Tensor, save_conv: bool) -> StemOutput:
    """Runs the stem on ``x`` [N, in_channels, H, W]."""
    backend = kernels.backend_for(x.device)
    conv_out = _convolve(stem, x)
    size = tuple(conv_out.shape[2:])
    rows = as_rows(conv_out)
    statistics = x.new_zeros(2, rows.shape[1], dtype=kernels.accumulation_dtype(x.dtype))
    if stem.norm.running is None:
        backend.channel_stats(rows, *statistics)
        if stem.synchronisation is not None:
            stem.synchronisation.merge(*statistics)
    affine = stem.norm.affine(backend, *statistics)
    out = kernels.empty_kept_images(x, x.shape[0], rows.shape[1], *spatial.max_pooled_size(size))
    spatial.bn_relu_max_pool(backend, rows, affine.scale, affine.shift, size, as_rows(out))
    return StemOutput(out, statistics, conv_out if save_conv else x.new_empty((0,)))


def backward_stem(
    stem: Stem, out_grad: Tensor, x: Tensor, saved: StemOutput, needed: list[bool]
) -> list[Tensor | None]:
    """The gradients of (input, convolution weight, norm weight, norm bias), None where not needed."""
    backend = kernels.backend_for(x.device)
    conv_out = saved.conv_out if saved.conv_out.numel() else _convolve(stem, x)
    size = tuple(conv_out.shape[2:])
    rows = as_rows(conv_out)
    affine = stem.norm.affine(backend, *saved.statistics)
    grad = kernels.empty_kept(rows, *rows.shape)
    sum_grad, sum_grad_x = torch.empty_like(affine.mean), torch.empty_like(affine.mean)
    spatial.bn_relu_max_pool_backward(
        backend, as_rows(out_grad).contiguous(), rows, affine.mean, affine.scale, affine.shift, size,
        grad, sum_grad, sum_grad_x,
    )  # fmt: skip
    projection = Projection(backend, rows.shape[1], affine.mean, stem.synchronisation)
    norm_grad = projection.add(stem.norm, affine, sum_grad, sum_grad_x, rows.shape[0])
    projection.apply(grad, rows, affine.mean, 0, rows.shape[1])
    del rows, conv_out
    conv_grads = _backward_convolution(stem, as_images(grad, *size), x, needed[:2])
    return [*conv_grads, norm_grad, sum_grad]


def _backward_convolution(stem: Stem, grad: Tensor, x: Tensor, needed: list[bool]) -> list[Tensor | None]:
    """The gradients of (input, weight), on the CPU a few images at a time.

    There torch's convolution turns the images and the gradient of a first layer into layouts of its own, which takes
    twice the memory of the gradient: for a whole batch that would be the peak of the step.
    """
    input_grad = kernels.empty_kept_images(x, *x.shape) if needed[0] else None
    conv_grad = stem.conv.new_zeros(stem.conv.shape, dtype=kernels.accumulation_dtype(x.dtype)) if needed[1] else None
    weight = channels_last(stem.conv.to(x.dtype))
    if (
        x.device.type == "cpu"
        and input_grad is None
        and conv_grad is not None
        and math.prod(grad.shape[2:]) > PIXELS_OF_A_BAND
    ):
        for grad_band, x_band, geometry in _bands(stem, grad, x):
            conv_grad += products.convolve_backward(grad_band, x_band, weight, geometry, [False, True])[1]
        return [None, conv_grad]
    for images in _some_images_at_a_time(grad) if any(needed) else ():
        input_part, conv_part = products.convolve_backward(
            grad[images], channels_last(x[images]), weight, stem.geometry, needed
        )
        if input_grad is not None:
            input_grad[images] = input_part
        if conv_grad is not None:
            conv_grad += conv_part
    return [input_grad, conv_grad]


def _bands(stem: Stem, grad: Tensor, x: Tensor) -> Iterator[tuple[Tensor, Tensor, products.Geometry]]:
    """Rows of the convolution's output, image by image, with the rows that they read and the geometry between them."""
    stride, padding = stem.stride, stem.padding
    geometry = products.geometry(stride, [0, *padding[1:]], dilation=1)
    at_a_time = max(PIXELS_OF_A_BAND // math.prod(grad.shape[3:]), 1)
    for image in range(x.shape[0]):
        rows = [0, 0] * (len(padding) - 1) + [padding[0], padding[0]]
        padded = channels_last(F.pad(x[image : image + 1], rows))
        for grad_band, start in zip(
            grad[image : image + 1].split(at_a_time, dim=2), range(0, grad.shape[2], at_a_time), strict=True
        ):
            read = (grad_band.shape[2] - 1) * stride[0] + stem.conv.shape[2]
            x_band = padded.narrow(2, start * stride[0], read)
            yield grad_band, x_band, geometry


def _convolve(stem: Stem, x: Tensor) -> Tensor:
    """The convolution's output in channels-last, which is what the pooling reads as rows.

    On the CPU a few images at a time, so that the whole of it lies in memory that is kept for the next step.
    """
    weight = channels_last(stem.conv.to(x.dtype))
    if x.device.type != "cpu":
        return channels_last(products.convolve(channels_last(x), weight, stem.geometry))
    size = stem.output_size(x.shape[2:])
    out = as_images(kernels.empty_kept(x, x.shape[0] * math.prod(size), weight.shape[0]), *size)
    for images in _some_images_at_a_time(out):
        out[images] = products.convolve(channels_last(x[images]), weight, stem.geometry)
    return out


def _some_images_at_a_time(conv_out: Tensor) -> list[slice]:
    images, _, *size = conv_out.shape
    at_a_time = images_at_a_time(conv_out.device.type, images, math.prod(size))
    return [slice(start, start + at_a_time) for start in range(0, images, at_a_time)]


def images_at_a_time(device: str, images: int, pixels: int) -> int:
    """How many of ``images`` are convolved at a time, each to ``pixels``; all of them on a GPU."""
    return max(PIXELS_AT_A_TIME // pixels, 1) if device == "cpu" else max(images, 1)
