"""The contract of the operations, and the choice of the backend that carries them out.

A backend is a module with the functions listed in `CONTRACT`; `dense_block.py` and `stem.py` are written once, over it,
and `spatial.py` makes the operations of one and three dimensions, of other kernel sizes and of dilations out of it.

Conventions, the same for every backend:

- ``x``, ``out``, ``grad``: 2-D views [M, C] (M = N*H*W pixels, channels last) with unit column stride and any row
  stride, so that a prefix or a slot of a dense block's storage is passed as it is. float32, float64, bfloat16, float16.
- Only `write_with_statistics`, by which images enter a storage, takes ``x`` [N, C, P]: P pixels of any strides.
- ``scale = gamma * rstd`` and ``shift = beta - mean * scale``, statistics and sums: 1-D, of `accumulation_dtype`
  (but `batch_norm_affine` takes statistics and parameters of any floating dtype).
- ``weight``: the convolution's own tensor [K, C, 1, 1] or [K, C, 3, 3], of any floating dtype (autocast keeps float32
  weights beside bfloat16 activations); ``grad_weight`` has its shape and `accumulation_dtype`. Both are contiguous or
  channels-last.
- The backward of the 1x1 convolution may leave ``out_grad`` changed; every other input is left as it was.
- Python allocates, the kernel fills what it is given. A statistic, sum or gradient that nobody needs is None; over no
  rows each is zero.
- ``g`` below is the gradient of the convolution's (or pooling's) input, masked by the ReLU:
  ``sum_grad = sum over M of g`` and ``sum_grad_x = sum over M of g * (x - mean)``, hence
  ``dbeta = sum_grad`` and ``dgamma = sum_grad_x * rstd``.
- ``grad`` receives ``scale * g``: assigned, or added where ``accumulate`` is true.
- Sums have an order that depends on shapes and values alone: two runs give the same bits with any number of threads.
"""

from __future__ import annotations

import importlib
import os
import warnings
from types import ModuleType

import torch

from ..layout import empty_images
from . import cpu, cuda, gpu, reference

CONTRACT = (
    "batch_norm_affine",
    "batch_norm_gradients",
    "channel_stats",
    "write_with_statistics",
    "bn_relu_conv1x1",
    "bn_relu_conv1x1_backward",
    "bn_relu_conv3x3",
    "bn_relu_conv3x3_backward",
    "project_gradient",
    "bn_relu_avg_pool",
    "bn_relu_avg_pool_backward",
    "bn_relu_max_pool",
    "bn_relu_max_pool_backward",
)
BACKEND_VARIABLE = "DENSENET_EFFICIENT_BACKEND"
BACKEND_NAMES = ("reference", "cpu", "triton", "cuda")
BACKENDS: dict[str, ModuleType] = {"reference": reference, "cpu": cpu, "cuda": cuda}  # triton joins when first used
DEFAULTS = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}  # by type of device, the best first

_announced: set[str] = set()


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics and sums for activations of ``dtype``: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def empty_kept(like: torch.Tensor, *size: int) -> torch.Tensor:
    """Uninitialised, of ``like``'s dtype and device; on the CPU its memory is kept, when freed, for the next step.

    There the system's work to hand out fresh pages would take up to a tenth of a step's time.
    """
    if like.device.type == "cpu" and cpu.is_available():
        return torch.ops.densenet_efficient.empty_kept(like, size)
    return like.new_empty(size)


def empty_kept_images(like: torch.Tensor, images: int, channels: int, *size: int) -> torch.Tensor:
    """As `empty_kept`: [N, C, *size] in channels-last, and no view, so that its receiver may modify it in place."""
    if like.device.type == "cpu" and cpu.is_available():
        return torch.ops.densenet_efficient.empty_kept(like, (images, channels, *size), channels_last=True)
    return empty_images(like, images, channels, *size)


def return_freed_memory() -> None:
    """Gives the CPU's memory that is kept for the next step back to the system; that step takes longer then."""
    if cpu.is_available():
        torch.ops.densenet_efficient.return_freed_memory()


def backend_name(device: torch.device | str) -> str:
    """The name of the backend that serves ``device``.

    Chosen by the device, or by the environment variable DENSENET_EFFICIENT_BACKEND, which works or raises. By default
    the CPU is served by "cpu"; a GPU by "cuda", or by "triton" where the native extension was built without CUDA.
    Where none of them can, "reference" serves, and says so once.

    Raises:
        ValueError: the variable names no backend.
        RuntimeError: the backend that it names cannot serve this device or is not built.
    """
    device = torch.device(device)
    requested = os.environ.get(BACKEND_VARIABLE)
    if requested:
        _check_requested(requested, device)
        return requested
    is_served = device.type in DEFAULTS or device.type == "meta"  # where nothing is computed
    reason = None if is_served else f"no other serves {device.type}"
    for name in DEFAULTS.get(device.type, ()):
        reason = why_not(name, device)
        if reason is None:
            return name
    if reason is not None:
        _announce_once(f"densenet_efficient runs on its slower plain-torch backend: {reason}.")
    return "reference"


def backend_for(device: torch.device) -> ModuleType:
    """The backend module that serves ``device``; raises as `backend_name` does."""
    return backend_named(backend_name(device))


def backend_named(name: str) -> ModuleType:
    """The backend module, whether or not it serves any device here."""
    if name not in BACKENDS:
        BACKENDS[name] = importlib.import_module(f"{__name__}.{name}")
    return BACKENDS[name]


def _check_requested(requested: str, device: torch.device) -> None:
    if requested not in BACKEND_NAMES:
        raise ValueError(f"{BACKEND_VARIABLE}={requested!r} names no backend; expected one of {sorted(BACKEND_NAMES)}")
    reason = why_not(requested, device)
    if reason is not None:
        raise RuntimeError(f"{BACKEND_VARIABLE}={requested} cannot serve a tensor on {device}: {reason}")


def why_not(name: str, device: torch.device) -> str | None:
    """Why a backend cannot serve ``device``, with the remedy; None where it can."""
    if name == "reference":
        return None
    if name == "cpu":
        return cpu.obstacle() if device.type == "cpu" else _wrong_device("cpu", "the CPU")
    if device.type == "cuda":
        return cuda.obstacle(device) if name == "cuda" else gpu.obstacle(device)
    if name == "triton" and device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return gpu.missing_triton()
    return _wrong_device(name, "a CUDA device")


def _wrong_device(name: str, served: str) -> str:
    return f"{name} serves {served} alone. Remedy: unset {BACKEND_VARIABLE} or move the model and its input there"


def _announce_once(message: str) -> None:
    if message not in _announced:
        _announced.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=3)
