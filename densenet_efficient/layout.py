"""Images [N, C, ...] of one, two or three dimensions as rows of pixels [M, C], and back."""

from __future__ import annotations

import torch
from torch import Tensor

MEMORY_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}  # by the number of all dimensions


def as_rows(images: Tensor) -> Tensor:
    """[N, C, ...] as [M, C] rows; a view where ``images`` is channels-last, else a copy."""
    return images.movedim(1, -1).flatten(0, -2)


def as_images(rows: Tensor, *size: int) -> Tensor:
    """[M, C] rows as an [N, C, *size] channels-last view."""
    return rows.unflatten(0, (-1, *size)).movedim(-1, 1)


def empty_images(like: Tensor, images: int, channels: int, *size: int) -> Tensor:
    """[N, C, *size] in channels-last, and no view, so that whoever receives it may modify it in place."""
    order = (0, *range(2, 2 + len(size)), 1)
    return torch.empty_permuted((images, channels, *size), order, dtype=like.dtype, device=like.device)


def is_channels_last(images: Tensor) -> bool:
    """Whether images or a weight of two or three dimensions are channels-last, without gaps."""
    return images.dim() in MEMORY_FORMATS and images.is_contiguous(memory_format=MEMORY_FORMATS[images.dim()])


def empty_gradient(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Of the weight's own layout where kernels write it, otherwise contiguous."""
    is_written = weight.is_contiguous() or is_channels_last(weight)
    memory_format = torch.preserve_format if is_written else torch.contiguous_format
    return torch.empty_like(weight, dtype=dtype, memory_format=memory_format)


def channels_last(images: Tensor) -> Tensor:
    """``images`` itself where it is channels-last, else a copy that is."""
    if images.dim() in MEMORY_FORMATS:
        return images.contiguous(memory_format=MEMORY_FORMATS[images.dim()])
    return as_images(as_rows(images).contiguous(), *images.shape[2:])
