"""Concatenation for models that grow their features by hand: `torch.cat` that leaves room behind what it gives.

A result is the beginning of a storage with room for more channels. Where it comes first in the next concatenation, only
the new channels are copied, into that room, and the next result is a longer view of the same storage: what autograd
saves of L growing features is one storage instead of L(L+1)/2 pieces.
"""

from __future__ import annotations

import threading
from collections.abc import MutableMapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.utils.weak import WeakTensorKeyDictionary

from .layout import MEMORY_FORMATS


@dataclass
class Room:
    """A storage of which the first ``used`` channels are filled."""

    storage: Tensor  # [N, capacity, ...]
    used: int

    def __post_init__(self) -> None:
        self.version = self.storage._version  # our own writes leave it alone when they end; a user's raise it
        self.lock = threading.Lock()  # for one thread at a time to look, and to write behind what it has seen

    def is_behind(self, result: Tensor) -> bool:
        """Whether the free channels begin where ``result`` ends."""
        return (
            result.shape[1] == self.used
            and result.data_ptr() == self.storage.data_ptr()
            and result.stride() == self.storage.stride()
            and (result.dtype, result.device) == (self.storage.dtype, self.storage.device)
        )


_rooms: MutableMapping[Tensor, Room] = WeakTensorKeyDictionary()  # by the result that ends where the room begins


def concatenate(tensors: Sequence[Tensor], channels: int | None = None) -> Tensor:
    """``torch.cat(tensors, 1)``, in shared storage where the first tensor is itself the result of `concatenate`.

    ::

        for layer in self.layers:
            x = concatenate([x, layer(x)], channels=self.out_channels)  # was: torch.cat([x, layer(x)], 1)

    The values and gradients are those of `torch.cat`, derivatives of any order included. What comes first must be what
    grew so far; two different continuations of one result are both right, the second one in a storage of its own.
    Results share memory, so none of them may be changed in place: PyTorch's autograd refuses it, and without gradients
    the next call does. Under ``torch.compile``, ``torch.func``, forward-mode differentiation, tracing and
    ``inference_mode`` it is `torch.cat`.

    Args:
        tensors: [N, C_i, ...], equal but for C_i, on one device; the result has the dtype that torch promotes to.
        channels: how many the storage shall hold in the end. Without it each new storage has room for twice as many as
            are in it, so that what is saved may take up to four times as much.

    Returns:
        [N, sum of C_i, ...], a view of the storage in the memory format of the first tensor.

    Raises:
        TypeError, RuntimeError: as `torch.cat` does; a result of before was changed in place.
        ValueError: ``channels`` is less than the sum of C_i.
    """
    if not isinstance(tensors, list | tuple):
        raise TypeError(f"tensors must be a list or tuple of tensors, got a {type(tensors).__name__}")
    tensors = list(tensors)
    if not _may_share(tensors):
        return torch.cat(tensors, 1)
    if not isinstance(channels, int | None):
        raise TypeError(f"channels must be an int, got {channels!r}")
    total = sum(tensor.shape[1] for tensor in tensors)
    if channels is not None and channels < total:
        raise ValueError(f"channels must be at least the {total} that are concatenated, got {channels}")
    first = tensors[0]
    dtype = reduce(torch.promote_types, [tensor.dtype for tensor in tensors])  # as torch.cat does, under autocast too
    room: Room | None = _rooms.get(first)
    with nullcontext() if room is None else room.lock:
        if room is not None and room.storage._version != room.version:
            raise RuntimeError(
                "a result of concatenate was changed in place, which changes every other one that shares its storage; "
                "use an operation that is not in place, or clone() the result first"
            )
        if room is None or not room.is_behind(first) or first.dtype != dtype or total > room.storage.shape[1]:
            room = _new_room(first, dtype, channels or 2 * total)
        result: Tensor = _Append.apply(room, *tensors)
    _rooms[result] = room
    return result


class _Append(torch.autograd.Function):
    """Copies what is not in the storage yet, and gives the view of all."""

    @staticmethod
    def forward(ctx: Any, room: Room, *tensors: Tensor) -> Tensor:
        ctx.channels = [tensor.shape[1] for tensor in tensors]
        new = tensors[1:] if room.used else tensors
        with _unsafe_preserve_version_counter(room.storage):
            for tensor in new:
                room.storage.narrow(1, room.used, tensor.shape[1]).copy_(tensor)
                room.used += tensor.shape[1]
        return room.storage.narrow(1, 0, room.used)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return None, *grads[0].split(ctx.channels, 1)


def _new_room(like: Tensor, dtype: torch.dtype, channels: int) -> Room:
    is_channels_last = like.dim() in MEMORY_FORMATS and like.shape[1] > 1 and like.stride(1) == 1
    memory_format = MEMORY_FORMATS[like.dim()] if is_channels_last else torch.contiguous_format
    shape = (like.shape[0], channels, *like.shape[2:])
    return Room(torch.empty(shape, dtype=dtype, device=like.device, memory_format=memory_format), used=0)


def _may_share(tensors: list[Tensor]) -> bool:
    """Whether these are plain tensors that fit one storage, and nothing watches that wants to see torch.cat.

    What does not fit is torch.cat's to refuse.
    """
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None or forward_ad._current_level >= 0:
        return False
    if torch.is_inference_mode_enabled() or torch._C._len_torch_dispatch_stack():
        return False
    if not all(type(tensor) in (Tensor, torch.nn.Parameter) for tensor in tensors):
        return False
    if any(torch._C._functorch.is_functorch_wrapped_tensor(tensor) or tensor.is_inference() for tensor in tensors):
        return False
    if any(tensor.dim() < 2 or tensor.layout != torch.strided for tensor in tensors):
        return False
    return len({(tensor.device, tensor.shape[:1], tensor.shape[2:]) for tensor in tensors}) == 1
