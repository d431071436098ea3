"""What PyTorch would raise for a wrong input, raised before anything is computed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import fusion


def check_images(conv: nn.Conv2d, x: Tensor) -> None:
    """What conv2d and batch_norm would raise, before anything is computed."""
    if not isinstance(x, Tensor):
        raise TypeError(f"expected a Tensor [N, {conv.in_channels}, H, W], got a {type(x).__name__}")
    if x.dim() != 4:
        error = ValueError if x.dim() == 3 else RuntimeError  # conv2d takes an image alone, batch_norm does not
        raise error(f"expected 4D input [N, {conv.in_channels}, H, W] (got {x.dim()}D input of size {tuple(x.shape)})")
    if x.shape[1] != conv.in_channels:
        raise RuntimeError(
            f"Given weight of size {list(conv.weight.shape)}, expected input{list(x.shape)} to have "
            f"{conv.in_channels} channels, but got {x.shape[1]} channels instead"
        )
    if min(x.shape[2:]) < 1 or convolved_pixels(conv, x) < 1:
        raise RuntimeError(f"input of size {tuple(x.shape)} is too small for a {conv.kernel_size} convolution")


def check_input(norm: nn.BatchNorm2d, x: Tensor) -> None:
    if x.dim() != 4:
        raise ValueError(f"expected 4D input (got {x.dim()}D input of size {tuple(x.shape)})")
    if x.shape[1] != norm.num_features:
        raise RuntimeError(f"expected input with {norm.num_features} channels, got input size {tuple(x.shape)}")


def check_poolable(norm: nn.BatchNorm2d | None, x: Tensor) -> None:
    if norm is not None and min(x.shape[2:]) < 2:
        size = f"{norm.num_features}x{x.shape[2]}x{x.shape[3]}"
        raise RuntimeError(
            f"Given input size: ({size}). Calculated output size: "
            f"({norm.num_features}x{x.shape[2] // 2}x{x.shape[3] // 2}). Output size is too small: give larger images"
        )


def check_count(norms: list[nn.BatchNorm2d], x: Tensor) -> None:
    if x.shape[0] * x.shape[2] * x.shape[3] == 1 and any(map(fusion.uses_batch_statistics, norms)):
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {tuple(x.shape)}")


def as_compute_dtype(x: Tensor, weights: list[Tensor]) -> Tensor:
    """``x`` in the dtype that convolutions with ``weights`` would compute in; raises where they would."""
    for weight in weights:
        if weight.device != x.device:
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but the input is on {x.device} "
                f"and the model on {weight.device}"
            )
    device = x.device.type
    # meta has no autocast to ask for; torch.compile of torch 2.11 cannot trace torch.amp.is_autocast_available
    casts = device != "meta" and torch.is_autocast_enabled(device)
    if casts and x.is_floating_point() and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(device))
    for weight in weights:
        if x.dtype != weight.dtype:
            raise RuntimeError(f"Input type ({x.dtype}) and weight type ({weight.dtype}) should be the same")
    return x


def convolved_pixels(conv: nn.Conv2d, x: Tensor) -> int:
    sizes = [
        (x.shape[2 + axis] + 2 * int(conv.padding[axis]) - conv.kernel_size[axis]) // conv.stride[axis] + 1
        for axis in (0, 1)
    ]
    return sizes[0] * sizes[1] if min(sizes) > 0 else 0
