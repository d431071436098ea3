"""Packages that only some functions need: imported when these are called, and missed with a remedy."""

from __future__ import annotations

import importlib
from typing import Any


def needed(module: str, extra: str) -> Any:
    """The module of this name.

    Raises:
        ModuleNotFoundError: its package is not installed; says which extra of this package brings it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if error.name != package:
            raise  # installed, but broken
        raise ModuleNotFoundError(
            f"this needs {package}, which is not installed: pip install 'densenet-efficient[{extra}]'", name=package
        ) from error
