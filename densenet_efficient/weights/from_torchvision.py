"""torchvision's weights: found by name, downloaded into torch.hub's cache."""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch

from ..optional import needed

_NAME = re.compile(r"(?:(\w+)_Weights\.)?(?:DEFAULT|IMAGENET\w*)")


def names_torchvision_weights(source: object) -> bool:
    """Whether this is a member of one of torchvision's enums of weights, or a text like the name of one."""
    return isinstance(source, Enum) or (isinstance(source, str) and _NAME.fullmatch(source) is not None)


def architecture_of(weights: Any) -> str | None:
    """The network that ``weights`` are of ("densenet121"), where they say so: "IMAGENET1K_V1" alone does not."""
    text = f"{type(weights).__name__}.{weights.name}" if isinstance(weights, Enum) else str(weights)
    match = _NAME.fullmatch(text)
    return match[1].lower() if match and match[1] else None


def find_weights(name: str, weights: Any) -> Any:
    """torchvision's weights of this model: a member of its enum, or the name of one ("IMAGENET1K_V1", "DEFAULT").

    Its ``transforms()`` are the preprocessing that the weights were trained with.

    Raises:
        ImportError: torchvision is not installed.
        ValueError: there are no such weights.
    """
    try:
        members = needed("torchvision.models", "hub").get_model_weights(name)
    except ValueError as error:
        raise ValueError(f"torchvision has no weights for {name}") from error
    if isinstance(weights, members):
        return weights
    enum, _, key = weights.rpartition(".") if isinstance(weights, str) else (None, None, None)
    if enum not in ("", members.__name__) or key not in members.__members__:
        known = ", ".join(members.__members__)
        raise ValueError(f"unknown weights {weights!r} for {name}; expected one of {known}")
    return members[key]


def download(weights: Any, progress: bool = True) -> Mapping[str, Any]:
    """The state_dict of torchvision's weights, from torch.hub's cache or, once, from the network.

    Raises:
        RuntimeError: it is not in the cache and cannot be downloaded; says where to put which file.
    """
    try:
        state: Mapping[str, Any] = weights.get_state_dict(progress=progress, check_hash=True, weights_only=True)
    except URLError as error:
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        raise RuntimeError(
            f"cannot download {weights.url} ({error.reason}); put {Path(weights.url).name} into {folder}"
        ) from error
    return state
