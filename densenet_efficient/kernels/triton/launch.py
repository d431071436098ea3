"""What every launch needs: its device, the precision of its products, the number of its programs."""

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import triton
from torch import Tensor

INTERPRETED_MULTIPROCESSORS = 3  # few, so that in the interpreter too a program works through several tiles


class Tile(NamedTuple):
    """The tile of a program: rows x columns of the result, ``depth`` of the product at a time."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


def on_device(tensor: Tensor) -> AbstractContextManager:
    """Makes the tensor's device the current one, on which Triton launches."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def dot_precision(dtype: torch.dtype) -> str:
    """How products of ``dtype`` are taken: float32 in tf32 where torch's own convolutions may do so."""
    tf32 = dtype == torch.float32 and torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]
    return "tf32" if tf32 else "ieee"


def row_programs(rows: int, tile_rows: int, device: torch.device, per_multiprocessor: int) -> int:
    """How many programs share ``rows``: as many as run at a time, or one for each tile where these are fewer."""
    return min(triton.cdiv(rows, tile_rows), per_multiprocessor * _multiprocessors(device))


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return INTERPRETED_MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count
