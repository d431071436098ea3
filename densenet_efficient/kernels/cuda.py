"""The backend of a GPU: the CUDA operators of ``csrc/cuda`` where bandwidth bounds, Triton for the convolutions."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch

from . import cpu, gpu

NATIVE = (
    "batch_norm_affine",
    "batch_norm_gradients",
    "channel_stats",
    "write_with_statistics",
    "project_gradient",
    "bn_relu_avg_pool",
    "bn_relu_avg_pool_backward",
    "bn_relu_max_pool",
    "bn_relu_max_pool_backward",
)


def obstacle(device: torch.device) -> str | None:
    """Why this backend cannot serve the GPU ``device``, with the remedy; None where it can."""
    return gpu.obstacle(device) or _missing_operators(device)


def architectures() -> str | None:
    """Those that the native extension was built for, as in TORCH_CUDA_ARCH_LIST; None without CUDA operators."""
    if not cpu.is_available():
        return None
    from densenet_efficient import _C

    return _C.build_info()["cuda_architectures"]


@functools.cache
def _missing_operators(device: torch.device) -> str | None:
    if not cpu.is_available():
        return cpu.obstacle()
    from densenet_efficient import _C

    built_for = architectures()
    if built_for is None:
        return f"its native extension was built without CUDA: {_C.build_info()['why_not_cuda']}"
    capability = torch.cuda.get_device_capability(device)
    if serves(built_for, capability):
        return None
    card = ".".join(map(str, capability))
    return (
        f"its native extension was built for the CUDA architectures {built_for}, this card is {card}. "
        f"Remedy: install the package again with TORCH_CUDA_ARCH_LIST={card}"
    )


def serves(architectures: str, capability: tuple[int, int]) -> bool:
    """Whether code for ``architectures`` (as in TORCH_CUDA_ARCH_LIST) runs on a card of this compute capability.

    Machine code runs on cards of its major version, from its minor version on; PTX on every later card. Either is
    bound to that very card where the number ends in an "a", and to that major version where it ends in an "f".
    """
    for architecture in architectures.replace(" ", ";").split(";"):
        number, _, ptx = architecture.partition("+")
        major, _, minor = number.rstrip("af").partition(".")
        built = (int(major), int(minor))
        if number.endswith("a") and built != capability:
            continue
        is_portable = ptx == "PTX" and not number.endswith("f")
        if built <= capability and (is_portable or built[0] == capability[0]):
            return True
    return False


def __getattr__(name: str) -> Any:
    """The operation of the contract, under the reference's arguments."""
    from . import CONTRACT

    if name not in CONTRACT:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in NATIVE:
        operation = getattr(torch.ops.densenet_efficient, name).default
    else:
        operation = getattr(importlib.import_module(f"{__package__}.triton"), name)
    globals()[name] = operation  # looked up once
    return operation
