"""Checkpoints: written whole or not at all, read without running code, complete enough to predict with.

A checkpoint is Lightning's, of tensors and plain values only, with one entry more: what the classifier is.
"""

from __future__ import annotations

import errno
import os
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from pytorch_lightning.plugins.io import TorchCheckpointIO

from densenet_efficient.files import atomic_write
from densenet_efficient.models import EfficientDenseNet
from densenet_efficient.training.preprocessing import Preprocessing
from densenet_efficient.weights.checkpoints import DAMAGED

ENTRY = "densenet_efficient"
REMEDY = "expected a checkpoint written by densenet-efficient fit"
# What a file system without hard links says, such as that of many an external drive.
WITHOUT_HARD_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
MODEL_PREFIX = "model."
LAST, PREVIOUS, BEST = "last.ckpt", "previous.ckpt", "best.ckpt"
# What of a network's configuration may change while it trains. (The classes are compared by name.)
CHANGEABLE = {"drop_rate", "checkpointing", "norm_eps", "num_classes"}


@dataclass(frozen=True)
class SavedClassifier:
    """A classifier as it is stored: its network, its classes, and how its input is made."""

    model: EfficientDenseNet
    class_names: list[str]
    multi_label: bool
    preprocessing: Preprocessing


def describe_classifier(classifier: SavedClassifier) -> dict[str, Any]:
    """The entry of a checkpoint, in plain values."""
    return {
        "config": classifier.model.config,
        "class_names": list(classifier.class_names),
        "multi_label": classifier.multi_label,
        "preprocessing": classifier.preprocessing.as_dict(),
    }


def load_classifier(path: str | Path) -> SavedClassifier:
    """Read a checkpoint onto the CPU, without running any code that it may hold. Averaged weights, where there are any.

    Raises OSError if there is no such file, pickle.UnpicklingError if it holds anything but tensors and plain
    values, and RuntimeError if it is damaged, of another program, or does not fit its own model.
    """
    content = read_checkpoint(path)
    entry = entry_of(path, content)
    try:
        state = content["state_dict"]
        model = EfficientDenseNet(**entry["config"])
        model.load_state_dict({key.removeprefix(MODEL_PREFIX): value for key, value in state.items()})
        return SavedClassifier(
            model,
            list(entry["class_names"]),
            bool(entry["multi_label"]),
            Preprocessing.from_dict(entry["preprocessing"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise RuntimeError(
            f"{path}: its weights are of another architecture than it says ({reason:.200}); {REMEDY}"
        ) from error


def entry_of(path: str | Path, content: Any) -> dict[str, Any]:
    """What a checkpoint says of its classifier; RuntimeError if it is another program's."""
    if not isinstance(content, dict) or not isinstance(content.get(ENTRY), dict):
        raise RuntimeError(f"{path}: not a checkpoint of densenet-efficient; {REMEDY}")
    entry: dict[str, Any] = content[ENTRY]
    return entry


def read_checkpoint(path: str | Path, map_location: Any = "cpu") -> Any:
    """The content of a checkpoint; raises as `load_classifier`."""
    if not Path(path).exists():
        raise FileNotFoundError(errno.ENOENT, f"No such file; {REMEDY}", str(path))
    with open(path, "rb") as file:
        if not _is_archive(file):  # its index stands at its end, so a truncated file has none
            raise RuntimeError(f"{path}: truncated, or not a checkpoint at all; {REMEDY}")
        try:
            if not _has_its_checksums(file):
                raise RuntimeError("another checksum")
            file.seek(0)
            return torch.load(file, map_location=map_location, weights_only=True)
        except pickle.UnpicklingError as error:
            raise pickle.UnpicklingError(
                f"{path}: refused, since it holds more than tensors and plain values; {REMEDY}"
            ) from error
        except DAMAGED as error:
            raise RuntimeError(f"{path}: damaged; {REMEDY}") from error


def is_whole(path: Path) -> bool:
    """Whether a checkpoint's file is there, with the content that was written."""
    try:
        with open(path, "rb") as file:
            if not _is_archive(file) or not _has_its_checksums(file):
                return False
        torch.load(path, map_location="cpu", weights_only=True, mmap=True)  # whose reader asks more of an archive
    except pickle.UnpicklingError:
        return True  # with content that is not ours, which its reader names
    except DAMAGED:
        return False
    return True


def _is_archive(file: BinaryIO) -> bool:
    try:
        return zipfile.is_zipfile(file)
    except zipfile.BadZipFile:  # an index that says that the archive has other volumes
        return False


def _has_its_checksums(file: BinaryIO) -> bool:
    """Whether every part of the archive has the checksum written with it, which torch.load does not ask."""
    with zipfile.ZipFile(file) as archive:
        return archive.testzip() is None


def last_whole(folder: Path) -> Path:
    """The last checkpoint of a run; where it is damaged and the one before it is whole, that one, and says so."""
    last, previous = folder / LAST, folder / PREVIOUS
    if is_whole(last) or not is_whole(previous):
        return last
    print(f"{last} is {'damaged' if last.exists() else 'missing'}: continuing from {previous}")
    return previous


def check_fits(path: str | Path, theirs: dict[str, Any], ours: SavedClassifier) -> None:
    """Raise ValueError if a checkpoint's entry is of other classes or of another network than the classifier."""
    _check_class_names(path, theirs["class_names"], ours.class_names)
    differences = [
        f"{name} {theirs['config'][name]}, not {value}"
        for name, value in ours.model.config.items()
        if name not in CHANGEABLE and theirs["config"].get(name, value) != value
    ]
    if differences:
        raise ValueError(
            f"{path}: a checkpoint of another network than was given ({'; '.join(differences)}); "
            "give the --model.network and --data.channels it was trained with, or train anew into another --output"
        )


def _check_class_names(path: str | Path, theirs: list[str], class_names: list[str]) -> None:
    """In the same order."""
    if theirs == class_names:
        return
    missing = [name for name in theirs if name not in class_names]
    added = [name for name in class_names if name not in theirs]
    differences = [f"only in the checkpoint: {', '.join(missing)}"] if missing else []
    differences += [f"only in the data: {', '.join(added)}"] if added else []
    raise ValueError(
        f"{path}: a checkpoint of another class list than the data ({'; '.join(differences) or 'another order'}); "
        "give the data it was trained on, or start from its weights alone with --model.weights"
    )


def _keep_as_previous(last: Path) -> None:
    """A second name for the same file, which the next one will not overwrite but replace."""
    link = last.with_name(f".{PREVIOUS}.{os.getpid()}")
    try:
        os.link(last, link)
        os.replace(link, last.with_name(PREVIOUS))
    except OSError as error:
        if error.errno not in WITHOUT_HARD_LINKS:
            raise
        os.replace(last, last.with_name(PREVIOUS))  # for a moment it is the only one, which `last_whole` knows
    finally:
        link.unlink(missing_ok=True)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes to a temporary file, waits for the disk, renames: an earlier checkpoint stands until the new is whole.

    The last but one stands beside the last, for the day on which a disk gives back other bytes than it got.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        path = Path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(path) as file:
                torch.save(checkpoint, file)
                if path.name == LAST and is_whole(path):
                    _keep_as_previous(path)
        except (OSError, RuntimeError) as error:
            kept = "the earlier one is kept" if path.exists() else "there is no earlier one"
            # Torch's own writer hides what the system said behind an error of its own.
            system = error.__context__ if isinstance(error.__context__, OSError) else error
            cause = system.strerror if isinstance(system, OSError) and system.strerror else str(error).splitlines()[0]
            raise OSError(
                f"{path}: cannot write this checkpoint ({cause}), {kept}; make room, "
                "then continue with --ckpt_path last"
            ) from error

    def load_checkpoint(
        self, path: Any, map_location: Callable[..., Any] | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        content: dict[str, Any] = read_checkpoint(path, map_location or "cpu")
        return content
