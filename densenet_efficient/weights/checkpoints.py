"""Checkpoints: files read without running what they hold, and the state_dict in them under this package's names."""

from __future__ import annotations

import lzma
import pickle
import re
import struct
import zipfile
import zlib
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..optional import needed
from .keras_files import KERAS_SUFFIXES, read_keras

ENTRY = "densenet_efficient"  # under which those of fit tell what is needed besides the weights
CONTAINERS = ("state_dict", "model_state_dict", "model")  # under which checkpoints keep a model's state
SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".safetensors", *KERAS_SUFFIXES)
# What reading an archive whose bytes are not those written may raise.
DAMAGED = (
    *(RuntimeError, OSError, EOFError, ValueError, KeyError, NotImplementedError, struct.error, zipfile.BadZipFile),
    *(zlib.error, lzma.LZMAError),  # where a flipped bit says that a part is compressed
)
_REFUSED = re.compile(r"GLOBAL (\S+)")  # what torch's reader says of a class or function
_PREFIXES = re.compile(r"^(?:module\.|_orig_mod\.|model\.)+")
_OTHER_NAMES = {
    "class_layers.out.": "classifier.",  # MONAI's
    "features.norm_final.": "features.norm5.",  # Pleiss et al.'s
}
_OLD_KEY = re.compile(r"(denselayer\d+\.)(?:layers\.)?(norm|relu|conv)\.?([12]\.)")


def read_file(path: str | Path) -> Any:
    """What a file holds: tensors by name from ``.safetensors``, a `KerasWeights` from ``.h5`` or ``.keras``, and from
    any other what ``torch.save`` put there. No code in it is run.

    Raises:
        ImportError: the package that reads this format is not installed.
        OSError: the file cannot be opened; FileNotFoundError where there is none.
        ValueError: the file is damaged, of another format, or holds objects that need code.
    """
    suffix = Path(path).suffix
    if suffix in KERAS_SUFFIXES:
        return read_keras(path)
    if suffix == ".safetensors":
        return _read_safetensors(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, *DAMAGED) as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise  # it could not be opened
        raise _unreadable(path, error) from error


def described_network(checkpoint: Any) -> dict[str, Any]:
    """The constructor's arguments, which checkpoints of `densenet-efficient fit` tell; empty for any other."""
    entry = checkpoint.get(ENTRY) if isinstance(checkpoint, Mapping) else None
    config = entry.get("config") if isinstance(entry, Mapping) else None
    return dict(config) if isinstance(config, Mapping) else {}


def _unreadable(path: str | Path, error: Exception) -> ValueError:
    """What to say of ``error``; nothing of torch's unpickler, which advises to run the code in the file."""
    refused = _REFUSED.search(str(error))
    if refused is not None:
        reason = f"holds something else than tensors ({refused[1]}), which would run code"
        return ValueError(f"{path} {reason}; save the model's state_dict()")
    cause = "" if isinstance(error, pickle.UnpicklingError) else str(error).partition("\n")[0]
    return ValueError(
        f"{path} is damaged, or no file of torch.save with tensors alone; copy it anew, or save the model's "
        f"state_dict(){cause and ': '}{cause}"
    )


def _read_safetensors(path: str | Path) -> Any:
    load_file = needed("safetensors.torch", "hub").load_file
    try:
        return load_file(path)
    except needed("safetensors", "hub").SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file: {error}") from error


def state_of(checkpoint: Any) -> dict[str, Tensor]:
    """The state_dict in ``checkpoint``, under the names of this package."""
    content = checkpoint
    for name in CONTAINERS:
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
    if not isinstance(content, Mapping) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise ValueError(f"found no state_dict, a mapping of names to tensors, in a {type(checkpoint).__name__}")
    return {name: content[key] for key, name in _own_names(content).items()}


def _own_names(state: Mapping[str, Tensor]) -> dict[str, str]:
    """The own name of each key. Of two keys with one name, which to load is not guessed."""
    names = {key: own_name(key) for key in state}
    clashes = [f"{name}: {', '.join(keys)}" for name, keys in _keys_by_name(names).items() if len(keys) > 1]
    if clashes:
        raise ValueError(f"several keys are one weight here; keep one of each: {'; '.join(clashes)}")
    return names


def _keys_by_name(names: Mapping[str, str]) -> dict[str, list[str]]:
    keys: dict[str, list[str]] = {}
    for key, name in names.items():
        keys.setdefault(name, []).append(key)
    return keys


def own_name(key: str, own: Container[str] = ()) -> str:
    """The key under this package's names: without prefixes, "norm1" for "norm.1", and for MONAI's "layers.norm1".

    ``own``: first parts of names that are no prefixes, of what a subclass has added.
    """
    if key.partition(".")[0] not in own:
        key = _PREFIXES.sub("", key)
    key = _OLD_KEY.sub(r"\1\2\3", key)
    for theirs, ours in _OTHER_NAMES.items():
        key = key.replace(theirs, ours)
    return key
