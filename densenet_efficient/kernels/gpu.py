"""What the backends of a GPU need: a card that is recent enough, and Triton."""

from __future__ import annotations

import functools
import importlib

import torch

LEAST_CAPABILITY = (8, 0)


def obstacle(device: torch.device) -> str | None:
    """Why no backend of ours can serve the GPU ``device``, with the remedy; None where one can."""
    return unsupported_card(device) or missing_triton()


@functools.cache
def unsupported_card(device: torch.device) -> str | None:
    """Why this card cannot be used, with the remedy; None where it can."""
    if not torch.cuda.is_available():
        missing = "a card and its driver" if torch.version.cuda else "a CUDA build of torch, and the card's driver"
        return f"this torch ({torch.__version__}) sees no GPU. Remedy: install {missing}"
    if torch.version.hip:  # whose Triton knows no option that limits the registers
        return "the kernels are made for NVIDIA's cards, this torch is a build for AMD's. Remedy: a card of NVIDIA's"
    capability = torch.cuda.get_device_capability(device)
    if capability >= LEAST_CAPABILITY:
        return None
    name, (major, minor) = torch.cuda.get_device_name(device), capability
    least = ".".join(map(str, LEAST_CAPABILITY))
    return (
        f"{name} has compute capability {major}.{minor}, below {least}. "
        "Remedy: a card of the Ampere generation or newer"
    )


@functools.cache
def missing_triton() -> str | None:
    """Why the Triton kernels cannot be imported, with the remedy; None where they can."""
    try:
        importlib.import_module(f"{__package__}.triton")
    except ImportError as error:
        return f"the Triton kernels could not be imported ({error}). Remedy: pip install triton"
    return None
