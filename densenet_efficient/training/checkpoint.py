"""Checkpoints: a model with its class names and preprocessing, in tensors and JSON-like values only."""

from __future__ import annotations

import pickle
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from densenet_efficient.models import EfficientDenseNet
from densenet_efficient.training.data import Preprocessing
from densenet_efficient.training.files import atomic_write

FORMAT = "densenet-efficient 1"
REMEDY = "expected a file written by densenet-efficient train"


@dataclass(frozen=True)
class Checkpoint:
    """A classifier as it is stored."""

    model: EfficientDenseNet
    class_names: list[str]
    preprocessing: Preprocessing


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write `checkpoint` whole or not at all: an earlier file stands until the new one is complete."""
    content = {
        "format": FORMAT,
        "config": checkpoint.model.config,
        "state_dict": checkpoint.model.state_dict(),
        "class_names": checkpoint.class_names,
        "preprocessing": checkpoint.preprocessing.as_dict(),
    }
    with atomic_write(path) as file:
        torch.save(content, file)


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint onto the CPU, without running any code that it may hold.

    Raises OSError if there is no such file, pickle.UnpicklingError if it holds anything but tensors and plain
    values, and RuntimeError if it is damaged, of another program, or does not fit its own model.
    """
    content = _read(Path(path))
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise RuntimeError(f"{path}: not a checkpoint of densenet-efficient; {REMEDY}")
    try:
        model = EfficientDenseNet(**content["config"])
        model.load_state_dict(content["state_dict"])
        checkpoint = Checkpoint(model, list(content["class_names"]), Preprocessing(**content["preprocessing"]))
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise RuntimeError(
            f"{path}: its weights are of another architecture than it says ({reason:.200}); {REMEDY}"
        ) from error
    return checkpoint


def _read(path: Path) -> Any:
    with open(path, "rb") as file:
        if not zipfile.is_zipfile(file):  # its index stands at its end, so a truncated file has none
            raise RuntimeError(f"{path}: truncated, or not a checkpoint at all; {REMEDY}")
        file.seek(0)
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise pickle.UnpicklingError(
                f"{path}: refused, since it holds more than tensors and plain values; {REMEDY}"
            ) from error
        except (RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
            raise RuntimeError(f"{path}: damaged; {REMEDY}") from error
