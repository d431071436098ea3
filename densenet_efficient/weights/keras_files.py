"""Weights of ``keras.applications.DenseNet121``, ``169``, ``201`` and of models built on them, as Keras saves them.

Keras pads with zeros in a layer of its own before a convolution or pooling without padding. Before the first
convolution that is a convolution with padding; before the pooling it stands behind a ReLU, whose outputs are not below
zero, so that a window's maximum is the same with zeros at the border as with PyTorch's minus infinity. What differs is
the epsilon of the batch norms, 1.001e-5, which a model takes over with these weights.

Layers are matched by their order within their kind, as Keras matches those of its ``.h5`` files: names differ from
format to format and from model to model.
"""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from ..optional import needed

KERAS_SUFFIXES = (".h5", ".keras")
EPSILON = 1.001e-5  # keras/src/applications/densenet.py

_CONVOLUTION = {"kernel": "weight"}
_NORM = {"gamma": "weight", "beta": "bias", "moving_mean": "running_mean", "moving_variance": "running_var"}
_DENSE = {"kernel": "weight", "bias": "bias"}
_KINDS: list[tuple[type[nn.Module], dict[str, str], tuple[int, ...]]] = [  # with the dimensions of their arrays
    (nn.Conv2d, _CONVOLUTION, (4,)),
    (nn.BatchNorm2d, _NORM, (1, 1, 1, 1)),
    (nn.Linear, _DENSE, (2, 1)),
]


@dataclass
class KerasWeights:
    """The arrays of every layer that has weights, by its name, in Keras's order and layout; and the norms' epsilon."""

    layers: dict[str, list[np.ndarray]]
    epsilon: float

    def state_for(self, model: nn.Module) -> dict[str, Tensor]:
        """Tensors under the names of ``model``; under Keras's own what has no counterpart there.

        Raises:
            ValueError: the file has other numbers of convolutions or batch norms than ``model``.
        """
        state: dict[str, Tensor] = {}
        rest = dict(self.layers)
        for module_class, names, dimensions in _KINDS:
            ours = [name for name, module in model.named_modules() if isinstance(module, module_class)]
            theirs = [name for name, arrays in rest.items() if tuple(array.ndim for array in arrays) == dimensions]
            if module_class is not nn.Linear and len(ours) != len(theirs):
                kind = module_class.__name__
                raise ValueError(
                    f"these are the weights of a network with {len(theirs)} {kind}, {_span(theirs)}; "
                    f"this {type(model).__name__} has {len(ours)}"
                )
            for own, name in zip(ours, theirs, strict=False):
                for array, attribute in zip(rest.pop(name), names.values(), strict=True):
                    state[f"{own}.{attribute}"] = _to_torch(array)
        return state | {f"{name} of Keras": _to_torch(array) for name, arrays in rest.items() for array in arrays}


def _span(names: list[str]) -> str:
    return f"{names[0]} to {names[-1]}" if names else "none"


def _to_torch(array: np.ndarray) -> Tensor:
    """[H, W, in, out] to [out, in, H, W], and [in, out] to [out, in]."""
    axes = {4: (3, 2, 0, 1), 2: (1, 0)}.get(array.ndim)
    return torch.from_numpy(np.ascontiguousarray(array if axes is None else array.transpose(axes)))


def read_keras(path: str | Path) -> KerasWeights:
    """The weights in a file of Keras: ``.keras``, ``.weights.h5``, or the older ``.h5`` of weights or of a model.

    Nothing of the model that the file describes is built, and nothing is read from other files.

    Raises:
        ImportError: h5py is not installed.
        FileNotFoundError: there is no such file.
        ValueError: the file is of another format.
    """
    h5py = needed("h5py", "keras")
    try:
        if Path(path).suffix != ".keras":
            with h5py.File(path, "r") as file:
                return _read(file, _text(file.attrs.get("model_config", "null")))
        with zipfile.ZipFile(path) as archive:
            config, weights = archive.read("config.json").decode(), archive.read("model.weights.h5")
        with h5py.File(io.BytesIO(weights), "r") as file:
            return _read(file, config)
    except FileNotFoundError:
        raise
    except (OSError, KeyError, ValueError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise ValueError(f"cannot read {path} as a file of Keras: {error}") from error


def _read(file: Any, config: str) -> KerasWeights:
    epsilons = set(_epsilons(json.loads(config))) or {EPSILON}
    if len(epsilons) > 1:
        raise ValueError(f"its batch norms have different epsilons, {sorted(epsilons)}; expected one for all")
    group = file.get("model_weights", file)
    layers = _older_layers(file, group) if "layer_names" in _lists(group) else _layers(file)
    if not layers:
        raise ValueError("it holds no layers with weights")
    return KerasWeights(layers, epsilons.pop())


def _epsilons(config: Any) -> Iterator[float]:
    """The epsilon of every batch norm in the description of a model."""
    if isinstance(config, dict):
        if config.get("class_name") == "BatchNormalization":
            yield float(config["config"]["epsilon"])
        config = list(config.values())
    if isinstance(config, list):
        for value in config:
            yield from _epsilons(value)


def _layers(file: Any) -> dict[str, list[np.ndarray]]:
    """Keras 3: a group "vars" per layer, whose arrays are numbered, and which may know the layer's name."""
    groups: dict[str, Any] = {}

    def visit(path: str, item: Any) -> None:
        if path.startswith("layers/") and path.endswith("/vars"):
            groups[path.removesuffix("/vars")] = item

    file.visititems(visit)
    layers: dict[str, list[np.ndarray]] = {}
    for path in sorted(groups, key=_natural):
        arrays = [_array(file, groups[path][name]) for name in sorted(groups[path], key=int)]
        if any(np.issubdtype(array.dtype, np.floating) for array in arrays):  # others are states of random generators
            name = _text(groups[path].attrs.get("name", path))
            layers[path if name in layers else name] = arrays
    return layers


def _older_layers(file: Any, group: Any) -> dict[str, list[np.ndarray]]:
    """Keras 1 and 2, and ``.h5`` in Keras 3: the layers and their weights are listed in attributes."""
    layers: dict[str, dict[str, np.ndarray]] = {}
    for layer in _lists(group)["layer_names"]:
        for weight in _lists(group[layer]).get("weight_names", []):
            owner, _, name = weight.rpartition("/")
            owner = owner if owner.startswith(layer) else f"{layer}/{owner}"  # a layer of a model within the model
            layers.setdefault(owner, {})[name.partition(":")[0]] = _array(file, group[layer][weight])
    return {owner: _in_order(arrays) for owner, arrays in layers.items()}


def _in_order(arrays: dict[str, np.ndarray]) -> list[np.ndarray]:
    names = next((list(names) for _, names, _ in _KINDS if set(names) == set(arrays)), list(arrays))
    return [arrays[name] for name in names]


def _lists(group: Any) -> dict[str, list[str]]:
    """The lists of names in the attributes; a long one is cut into "layer_names0", "layer_names1" and so on."""
    lists: dict[str, list[str]] = {}
    for key in sorted(group.attrs, key=_natural):
        name = key.rstrip("0123456789")
        if name in ("layer_names", "weight_names"):
            lists.setdefault(name, []).extend(map(_text, group.attrs[key]))
    return lists


def _array(file: Any, dataset: Any) -> np.ndarray:
    if dataset.is_virtual or dataset.external or dataset.file.filename != file.filename:
        raise ValueError(f"{dataset.name} stands in another file, which is not opened")
    array = cast(np.ndarray, dataset[()])
    if dataset.attrs.get("dtype") == "bfloat16":  # the upper half of a float32
        array = (array.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return array


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _natural(name: str) -> list[Any]:
    """A key to sort by in which the numbers within names count as numbers."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
