"""A block's storage waits for its backward in the host's memory; it comes back while the next block runs backward.

Both copies go through pinned memory on a stream of their own, beside the computations.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from weakref import WeakValueDictionary, ref

import torch
from torch import Tensor


def offloaded(wanted: bool, x: Tensor, parameters: Sequence[Tensor]) -> AbstractContextManager:
    """The context in which a stage's operator runs on ``x``; where ``wanted``, its storage leaves the GPU.

    On the CPU, where the storage is in the host's memory already, nothing happens.

    Raises:
        RuntimeError: a graph of operations is being made, in which no memory can be pinned.
    """
    if not wanted or x.device.type != "cuda" or not torch.is_grad_enabled():
        return nullcontext()
    if torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "a storage cannot be offloaded to the host within torch.compile or a CUDA graph; "
            "remedy: set_memory_budget without offload"
        )
    return leaving(x, parameters)


def leaving(x: Tensor, parameters: Sequence[Tensor]) -> torch.autograd.graph.saved_tensors_hooks:
    """Of what a stage saves that runs on ``x``, the storage leaves: the images that are no parameter."""
    of_parameters = {parameter.data_ptr() for parameter in parameters}
    images = _images(x)  # and not x, which what is saved would keep alive with these functions

    def is_storage(saved: Tensor) -> bool:
        return _images(saved) == images and saved.data_ptr() not in of_parameters

    def leave(saved: Tensor) -> Tensor | _Away:
        return _Away(saved) if is_storage(saved) else saved

    def come_back(kept: Tensor | _Away) -> Tensor:
        return kept.take() if isinstance(kept, _Away) else kept

    return torch.autograd.graph.saved_tensors_hooks(leave, come_back)


def _images(x: Tensor) -> tuple[int, ...]:
    """Their number and size."""
    return (*x.shape[:1], *x.shape[2:])


class Lane:
    """The copies between a GPU and the host, in the order in which they are asked for."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)

    def to_host(self, tensor: Tensor) -> Tensor:
        """A copy in pinned memory, which `to_device` may read at once."""
        copy = torch.empty_like(tensor, device="cpu", pin_memory=True)
        self._copy(tensor, copy)
        tensor.record_stream(self.stream)
        return copy

    def to_device(self, host: Tensor) -> tuple[Tensor, torch.cuda.Event]:
        """A copy on the GPU, and when it is complete. Its memory is the computations', which may have just freed it."""
        copy = torch.empty_like(host, device=self.device)
        self._copy(host, copy)
        copy.record_stream(self.stream)
        return copy, self.stream.record_event()

    def wait(self, complete: torch.cuda.Event) -> None:
        """The computations asked for from now on begin after ``complete``."""
        torch.cuda.current_stream(self.device).wait_event(complete)

    def _copy(self, source: Tensor, target: Tensor) -> None:
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            target.copy_(source, non_blocking=True)


_lanes: dict[torch.device, Lane] = {}
_last: WeakValueDictionary[torch.device, _Away] = WeakValueDictionary()


def lane_of(device: torch.device) -> Lane:
    """The one of ``device``, made where there is none."""
    if device not in _lanes:
        _lanes[device] = Lane(device)
    return _lanes[device]


class _Away:
    """A storage that left its GPU, until the backward takes it."""

    def __init__(self, storage: Tensor) -> None:
        self.lane = lane_of(storage.device)
        self.host = self.lane.to_host(storage)
        self.coming: tuple[Tensor, torch.cuda.Event] | None = None
        self.was_needed = False
        before = _last.get(storage.device)
        self.before = None if before is None else ref(before)  # the one that the backward needs next
        _last[storage.device] = self

    def call(self) -> None:
        """Begins the way back."""
        if self.coming is None:
            self.coming = self.lane.to_device(self.host)

    def take(self) -> Tensor:
        """The storage on its GPU; the one that left before it is called, to come while this one is used."""
        self.call()
        assert self.coming is not None
        (storage, complete), self.coming, self.was_needed = self.coming, None, True
        self.lane.wait(complete)
        before = None if self.before is None else self.before()
        if before is not None and not before.was_needed:  # as it was if it is of an earlier step's graph
            before.call()
        return storage
