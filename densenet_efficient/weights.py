"""Weights from a file or from torchvision: read without executing code, renamed, adapted, every key accounted for."""

from __future__ import annotations

import math
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch
from torch import Tensor, nn

CONTAINERS = ("state_dict", "model_state_dict", "model")  # under which checkpoints keep a model's state
_PREFIXES = re.compile(r"^(?:module\.|_orig_mod\.|model\.)+")
_OLD_KEY = re.compile(r"(denselayer\d+\.)(?:layers\.)?(norm|relu|conv)\.?([12]\.)")
FIRST_CONVOLUTION = "features.conv0.weight"


def load_weights(model: nn.Module, source: str | Path | Mapping[str, Any]) -> list[str]:
    """Loads weights into a model with torchvision's names, an `EfficientDenseNet` for one.

    Known are torchvision's keys, its old ones ("norm.1"), timm's, MONAI's and torchxrayvision's, with any of the
    prefixes "module.", "_orig_mod." and "model.". A classifier of another number of classes is not loaded. The first
    convolution is adapted to another number of input channels as timm does (timm/models/_manipulate.py): summed to one
    channel, or repeated and scaled.

    Args:
        model: what to load into.
        source: a state_dict, a checkpoint that holds one, or the path of either: ``.safetensors``, or a file of
            ``torch.save``, read with ``weights_only=True``.

    Returns:
        What was adapted or not loaded, in words; empty where everything fitted.

    Raises:
        ValueError: keys are missing, unknown or of another shape, all of which it names; or the file holds something
            else than tensors. ``model`` is as it was.
    """
    state = state_of(read_checkpoint(source) if isinstance(source, str | Path) else source)
    own = model.state_dict()
    notes = [*_keep_classifier(state, own), *_adapt_first_convolution(state, own)]
    problems = _problems(state, own)
    if problems:
        raise ValueError(f"the weights do not fit this {type(model).__name__}: {'; '.join(problems)}")
    model.load_state_dict(own | state)
    return notes


def read_checkpoint(path: str | Path) -> Any:
    """What a ``.safetensors`` file, or any other as one of ``torch.save``, holds; no code in it is run.

    Raises:
        ImportError: safetensors is not installed.
        ValueError: the file is of another format, or holds objects that need code.
    """
    if Path(path).suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is no safetensors file: {error}") from error
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError) as error:
        raise ValueError(
            f"{path} holds something else than tensors, which would run code; save a state_dict: {error}"
        ) from error


def state_of(checkpoint: Any) -> dict[str, Tensor]:
    """The state_dict in ``checkpoint``, under the names of this package."""
    content = checkpoint
    for name in CONTAINERS:
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
    if not isinstance(content, Mapping) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise ValueError(f"found no state_dict, a mapping of names to tensors, in a {type(checkpoint).__name__}")
    return {own_name(key): value for key, value in content.items()}


def own_name(key: str) -> str:
    """The key under this package's names: without prefixes, "norm1" for "norm.1", and for MONAI's "layers.norm1"."""
    key = _OLD_KEY.sub(r"\1\2\3", _PREFIXES.sub("", key))
    return key.replace("class_layers.out.", "classifier.")


def _keep_classifier(state: dict[str, Tensor], own: dict[str, Any]) -> list[str]:
    """Leaves the model's own classifier where that of ``state`` has other classes."""
    weight, expected = state.get("classifier.weight"), own.get("classifier.weight")
    if weight is None or expected is None or weight.shape[0] == expected.shape[0]:
        return []
    for name in ("classifier.weight", "classifier.bias"):
        state[name] = own[name]
    return [f"the classifier of {weight.shape[0]} classes was not loaded: the model has {expected.shape[0]}"]


def _adapt_first_convolution(state: dict[str, Tensor], own: dict[str, Any]) -> list[str]:
    weight, expected = state.get(FIRST_CONVOLUTION), own.get(FIRST_CONVOLUTION)
    if weight is None or expected is None or weight.dim() != expected.dim() or weight.shape[1] == expected.shape[1]:
        return []
    given, wanted = weight.shape[1], expected.shape[1]
    if wanted == 1:
        state[FIRST_CONVOLUTION] = weight.sum(1, keepdim=True)
    elif given == 3:
        repeats = (1, math.ceil(wanted / 3), *[1] * (weight.dim() - 2))
        state[FIRST_CONVOLUTION] = weight.repeat(repeats)[:, :wanted] * (3 / wanted)
    else:
        return []  # its shape does not fit, which is said with all the others
    return [f"{FIRST_CONVOLUTION} was adapted from {given} input channels to {wanted}"]


def _problems(state: dict[str, Tensor], own: dict[str, Any]) -> list[str]:
    """Every key that does not fit, and why. Weights older than num_batches_tracked may lack it."""
    unknown = [f"unknown {key}" for key in state if key not in own]
    missing = [f"missing {key}" for key in own if key not in state and not key.endswith("num_batches_tracked")]
    shapes = [
        f"{key} of shape {list(value.shape)} instead of {list(own[key].shape)}"
        for key, value in state.items()
        if key in own and value.shape != own[key].shape
    ]
    return unknown + missing + shapes


def find_weights(name: str, weights: Any) -> Any:
    """torchvision's weights of this model: a member of its enum, or the name of one ("IMAGENET1K_V1", "DEFAULT").

    Its ``transforms()`` are the preprocessing that the weights were trained with.

    Raises:
        ImportError: torchvision is not installed.
        ValueError: there are no such weights.
    """
    from torchvision.models import get_model_weights

    try:
        members = get_model_weights(name)
    except ValueError as error:
        raise ValueError(f"torchvision has no weights for {name}") from error
    if isinstance(weights, members):
        return weights
    key = weights.rpartition(".")[2] if isinstance(weights, str) else None
    if key not in members.__members__:
        known = ", ".join(members.__members__)
        raise ValueError(f"unknown weights {weights!r} for {name}; expected one of {known}")
    return members[key]


def download(weights: Any) -> Mapping[str, Any]:
    """The state_dict of torchvision's weights, from torch.hub's cache or, once, from the network.

    Raises:
        RuntimeError: it is not in the cache and cannot be downloaded; says where to put which file.
    """
    try:
        state: Mapping[str, Any] = weights.get_state_dict(progress=True, check_hash=True, weights_only=True)
    except URLError as error:
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        raise RuntimeError(
            f"cannot download {weights.url} ({error.reason}); put {Path(weights.url).name} into {folder}"
        ) from error
    return state
