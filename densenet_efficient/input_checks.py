"""What PyTorch would raise for a wrong input, raised before anything is computed."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from . import fusion
from .dimensions import AXES, BatchNorm, Convolution, dims_of
from .stage import HEAD


def check_images(conv: Convolution, x: Tensor) -> None:
    """What the convolution and the batch norm would raise, before anything is computed."""
    dims = dims_of(conv)
    shape = f"[N, {conv.in_channels}, {AXES[dims]}]"
    if not isinstance(x, Tensor):
        raise TypeError(f"expected a Tensor {shape}, got a {type(x).__name__}")
    if x.dim() != dims + 2:
        # a convolution takes an image alone, if of its channels; batch_norm does not, or takes it for [N, C]
        is_convolved = x.dim() == dims + 1 and x.shape[0] == conv.in_channels
        error = ValueError if is_convolved and dims > 1 else RuntimeError
        raise error(f"expected {dims + 2}D input {shape} (got {x.dim()}D input of size {tuple(x.shape)})")
    if x.shape[1] != conv.in_channels:
        raise RuntimeError(
            f"Given weight of size {list(conv.weight.shape)}, expected input{list(x.shape)} to have "
            f"{conv.in_channels} channels, but got {x.shape[1]} channels instead"
        )
    if min(x.shape[2:]) < 1 or 0 in convolved_size(conv, x):
        raise RuntimeError(f"input of size {tuple(x.shape)} is too small for a {conv.kernel_size} convolution")


def check_input(norm: BatchNorm, dims: int, x: Tensor) -> None:
    """What the first norm of a dense block, of ``dims`` spatial dimensions, would raise."""
    shape = f"[N, {norm.num_features}, {AXES[dims]}]"
    if not isinstance(x, Tensor):
        raise TypeError(f"expected a Tensor {shape}, got a {type(x).__name__}")
    if x.dim() != dims + 2:
        raise ValueError(f"expected {dims + 2}D input {shape} (got {x.dim()}D input of size {tuple(x.shape)})")
    if x.shape[1] != norm.num_features:
        raise RuntimeError(f"expected input with {norm.num_features} channels, got input size {tuple(x.shape)}")


def check_poolable(stage_exit: fusion.StageExit, x: Tensor) -> None:
    """What the 2x2 pooling of a transition would raise; other exits have none."""
    norm = stage_exit.norm
    if norm is not None and stage_exit.kind != HEAD and min(x.shape[2:]) < 2:
        size, pooled = (
            "x".join(map(str, (norm.num_features, *lengths)))
            for lengths in (x.shape[2:], [length // 2 for length in x.shape[2:]])
        )
        raise RuntimeError(
            f"Given input size: ({size}). Calculated output size: ({pooled}). "
            "Output size is too small: give larger images"
        )


def check_count(norms: list[BatchNorm], count: int, x: Tensor) -> None:
    """What a norm would raise that takes its statistics over ``count`` values per channel, made from ``x``."""
    if count == 1 and any(map(fusion.uses_batch_statistics, norms)):
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {tuple(x.shape)}")


def check_devices(x: Tensor, tensors: Iterable[Tensor]) -> None:
    """Kernels read what they are given, wherever it is: here parts of a model are found that were left elsewhere."""
    device = x.device
    for tensor in tensors:
        if tensor.device != device:
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but the input is on {device} "
                f"and the model on {tensor.device}"
            )


def compute_dtype(x: Tensor, weights: list[Tensor]) -> torch.dtype:
    """The dtype that convolutions of ``x`` with ``weights`` would compute in; raises where they would."""
    device = x.device.type
    # meta has no autocast to ask for; torch.compile of torch 2.11 cannot trace torch.amp.is_autocast_available
    casts = device != "meta" and torch.is_autocast_enabled(device)
    if casts and x.is_floating_point() and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    for weight in weights:
        if x.dtype != weight.dtype:
            raise RuntimeError(f"Input type ({x.dtype}) and weight type ({weight.dtype}) should be the same")
    return x.dtype


def as_compute_dtype(x: Tensor, weights: list[Tensor]) -> Tensor:
    """``x`` in its `compute_dtype`."""
    return x.to(compute_dtype(x, weights))


def pixels(x: Tensor) -> int:
    """N * H * W, the values of each channel."""
    return x.shape[0] * math.prod(x.shape[2:])


def convolved_size(conv: Convolution, x: Tensor) -> tuple[int, ...]:
    """(H, W) of what ``conv`` gives, 0 where ``x`` is too small for it."""
    axes = zip(x.shape[2:], conv.kernel_size, conv.stride, map(int, conv.padding), strict=True)
    return tuple(max((length + 2 * padding - kernel) // stride + 1, 0) for length, kernel, stride, padding in axes)
