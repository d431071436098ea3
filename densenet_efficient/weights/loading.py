"""Weights into a model: renamed, adapted, every key accounted for, the model as it was where they do not fit."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .checkpoints import read_file, state_of
from .keras_files import KerasWeights

FIRST_CONVOLUTION = "features.conv0.weight"
CLASSIFIER = ("classifier.weight", "classifier.bias")
# What others keep beside the weights, and what it is.
NO_WEIGHTS = {
    "op_threshs": "the thresholds by which torchxrayvision scales its outputs",
    "n_averaged": "the count of torch's AveragedModel",
}
MOST_NAMED = 10  # keys of another network's weights
_FIRST_NORM = re.compile(r"features\.denseblock(\d+)\.denselayer\d+\.norm1\.weight")


def load_weights(model: nn.Module, source: str | Path | Mapping[str, Any]) -> list[str]:
    """Loads weights into a model with torchvision's names, an `EfficientDenseNet` for one.

    Known are torchvision's keys, its old ones ("norm.1"), timm's, MONAI's, torchxrayvision's and those of Pleiss et
    al.'s efficient_densenet_pytorch ("norm_final"), with any of the prefixes "module.", "_orig_mod." and "model.", and
    the files of Keras, from which the batch norms take over their epsilon. A classifier of another number of classes is
    not loaded. The first convolution is adapted to another number of input channels as timm does
    (timm/models/_manipulate.py): summed to one channel, or repeated and scaled.

    Args:
        model: what to load into.
        source: a state_dict, a checkpoint that holds one, or the path of either: ``.safetensors``, ``.h5`` or
            ``.keras`` of Keras's applications, or a file of ``torch.save``, read with ``weights_only=True``.

    Returns:
        What was adapted or not loaded, in words; empty where everything fitted.

    Raises:
        TypeError: ``model`` is not a module.
        ImportError: the package that reads this format is not installed.
        FileNotFoundError: there is no such file.
        ValueError: keys are missing, unknown, of another shape or there twice with different prefixes, all of which it
            names; or the file is damaged or holds something else than tensors. ``model`` is as it was.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module to load weights into, got a {type(model).__name__}")
    checkpoint = read_file(source) if isinstance(source, str | Path) else source
    state = checkpoint.state_for(model) if isinstance(checkpoint, KerasWeights) else state_of(checkpoint)
    own = model.state_dict()
    notes = [*_leave_no_weights(state, own), *_keep_classifier(state, own), *_adapt_first_convolution(state, own)]
    problems = _problems(state, own)
    if problems:
        reasons = "; ".join(_of_another_topology(state, own, problems) or problems)
        raise ValueError(f"the weights do not fit this {type(model).__name__}: {reasons}")
    model.load_state_dict(own | state)
    if isinstance(checkpoint, KerasWeights):
        _set_epsilon(model, checkpoint.epsilon)
    return notes


def _leave_no_weights(state: dict[str, Tensor], own: dict[str, Any]) -> list[str]:
    """Takes out of ``state`` what is known to be none of a network's weights."""
    left = [key for key in NO_WEIGHTS if key in state and key not in own]
    for key in left:
        del state[key]
    return [f"{key} was not loaded: it is {NO_WEIGHTS[key]}" for key in left]


def _keep_classifier(state: dict[str, Tensor], own: dict[str, Any]) -> list[str]:
    """Leaves the model's own classifier where ``state`` has none, or one of other classes."""
    weight, expected = state.get("classifier.weight"), own.get("classifier.weight")
    if expected is None or (weight is not None and weight.shape[0] == expected.shape[0]):
        return []
    if weight is None and "classifier.bias" in state:
        return []  # half a classifier, which is said with all the others
    for name in CLASSIFIER:
        state.pop(name, None)
        if name in own:
            state[name] = own[name]
    if weight is None:
        return [f"no classifier was loaded: the weights have none, the model keeps its own of {expected.shape[0]}"]
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


def _of_another_topology(state: Iterable[str], own: Iterable[str], problems: list[str]) -> list[str]:
    """Says so where ``state`` is of another network, of which some keys are enough: often hundreds do not fit."""
    given, expected = _layers_of_blocks(state), _layers_of_blocks(own)
    if given == expected:
        return []
    topology = f"they have dense blocks of {given or 'no'} layers, the model of {expected or 'no'}"
    more = len(problems) - MOST_NAMED
    return [topology, *problems[:MOST_NAMED], *([f"and {more} keys more"] if more > 0 else [])]


def _layers_of_blocks(keys: Iterable[str]) -> list[int]:
    blocks = Counter(int(match[1]) for key in keys if (match := _FIRST_NORM.fullmatch(key)))
    return [blocks[block] for block in sorted(blocks)]


def _set_epsilon(model: nn.Module, epsilon: float) -> None:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = epsilon
    config = getattr(model, "config", None)
    if isinstance(config, dict) and "norm_eps" in config:
        config["norm_eps"] = epsilon
