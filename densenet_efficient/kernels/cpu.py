"""The native CPU backend: the C++ operators of ``csrc/cpu``, under the contract of `densenet_efficient.kernels`."""

from __future__ import annotations

from typing import Any

import torch


def _why_unavailable() -> str | None:
    try:
        from densenet_efficient import _C
    except ImportError as error:
        return f"its native extension densenet_efficient._C could not be imported ({error})"
    built, running = (version.split(".")[:2] for version in (_C.build_info()["torch"], torch.__version__))
    if built != running:
        return f"its native extension was built for torch {'.'.join(built)}, this is torch {'.'.join(running)}"
    return None


_unavailable_reason = _why_unavailable()


def is_available() -> bool:
    """Whether the native extension was built and loads."""
    return _unavailable_reason is None


def capabilities() -> list[str]:
    """Those built in, ascending, up to the one in use; the native extension must be there."""
    from densenet_efficient import _C

    built: list[str] = _C.build_info()["cpu_capabilities"]
    return built[: built.index(_C.cpu_capability()) + 1]


def obstacle() -> str | None:
    """Why the native extension is not there, and the remedy; None where it is."""
    return _unavailable_reason and (
        f"{_unavailable_reason}. Remedy: with a C++ compiler (g++ or clang++), install the package again for this "
        "torch (pip install --force-reinstall --no-deps --no-build-isolation)"
    )


def __getattr__(name: str) -> Any:
    """The operator ``torch.ops.densenet_efficient.<name>``, whose arguments are those of the reference function."""
    from . import CONTRACT

    if name not in CONTRACT:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = operator = getattr(torch.ops.densenet_efficient, name).default  # looked up once
    return operator
