"""What every launch needs: its kernel, its device, the precision of its products, the size of its tiles.

Kernels count pixels in 32 bits and elements in 64.
"""

import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple, Protocol

import torch
import triton
from torch import Tensor

# Where there is no card: few multiprocessors, so that in the interpreter too a program works through several tiles.
INTERPRETED_MULTIPROCESSORS = 4
INTERPRETED_CAPABILITY = 9
MOST_PIXELS = 2**31 - 2**11  # as many as end, with the tile that the last of them begins, below 2^31; as in host.h


class Listener(Protocol):
    """Who wants to know of launches."""

    def launched(self, compiled: Any, blocks: Sequence[int], arguments: Sequence[Any]) -> None:
        """Triton's compiled kernel, its number of programs along each axis, and its arguments in order."""


_of_thread = threading.local()


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Within, ``listener`` is told of every launch of this thread."""
    before = getattr(_of_thread, "listener", None)
    _of_thread.listener = listener
    try:
        yield
    finally:
        _of_thread.listener = before


class Kernel:
    """What `triton.jit` makes of a function, launched as that is: ``kernel[blocks](*arguments, **options)``.

    With fused multiply-adds, as the CUDA kernels are compiled: Triton's default, which is to change (3.10).
    """

    def __init__(self, function: Any) -> None:
        self.function = function

    def __getitem__(self, blocks: Sequence[int]) -> Callable[..., Any]:
        launch: Callable[..., Any] = functools.partial(self.function[blocks], enable_fp_fusion=True)
        listener: Listener | None = getattr(_of_thread, "listener", None)
        if listener is None:
            return launch

        def launch_and_tell(*arguments: Any, **options: Any) -> None:
            listener.launched(launch(*arguments, **options), blocks, arguments)

        return launch_and_tell


def kernel(**options: Any) -> Callable[[Callable[..., Any]], Kernel]:
    """Decorates a kernel that is launched, with the options of `triton.jit`; what kernels call, that itself does."""
    return lambda function: Kernel(triton.jit(function, **options))


class Tile(NamedTuple):
    """A program's tile: rows x columns of the result, ``depth`` of the product at a time; how it is compiled."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    registers: int | None = None  # at most, of a thread

    def options(self) -> dict[str, int | None]:
        """The options of a launch."""
        return {"num_warps": self.warps, "num_stages": self.stages, "maxnreg": self.registers}


def on_device(tensor: Tensor) -> AbstractContextManager:
    """Makes the tensor's device the current one, on which Triton launches; nothing where it is, for that takes time."""
    if not tensor.is_cuda or tensor.get_device() == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(tensor.device)


def dot_precision(dtype: torch.dtype) -> str:
    """How products of ``dtype`` are taken: float32 in tf32 where torch's own convolutions may do so."""
    tf32 = dtype == torch.float32 and torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]
    return "tf32" if tf32 else "ieee"


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many programs run at a time, one on each multiprocessor."""
    if device.type != "cuda":
        return INTERPRETED_MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def has_warpgroup_products(device: torch.device) -> bool:
    """Whether the tensor cores take operands of a group of warps from shared memory, as Hopper's (9.x) do."""
    capability = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else INTERPRETED_CAPABILITY
    return capability == 9


def ceil_div(number: int, divisor: int) -> int:
    """Triton's own takes ten times as long, for it serves kernels too; a step asks a thousand times."""
    return -(-number // divisor)


def next_power_of_two(number: int) -> int:
    """The least that is not below ``number``."""
    return 1 << (number - 1).bit_length()


def grid_of(parts: int, channels: int, columns: int) -> tuple[int]:
    """A program for each block of channels of each part of the rows, as `blocks.block_and_part` numbers them."""
    return (parts * ceil_div(channels, columns),)


def programs_per_block(rows: int, tile_rows: int, blocks: int, programs: int) -> int:
    """How many programs share the rows of each of ``blocks`` so that ``programs`` run at a time; none without rows."""
    return min(ceil_div(rows, tile_rows), max(programs // blocks, 1))


def check_pixels(pixels: int) -> None:
    """Raises RuntimeError for more pixels than kernels count: where a stage takes statistics, and in poolings."""
    if pixels > MOST_PIXELS:
        raise RuntimeError(f"x must have at most {MOST_PIXELS} pixels, got {pixels}; use a smaller batch")


def pixel_tile(channels: int, elements: int) -> tuple[int, int]:
    """(rows, columns), powers of two, of a tile of ``elements`` of an operation that bandwidth bounds."""
    columns = min(next_power_of_two(channels), 64)
    return min(elements // columns, 1024), columns
