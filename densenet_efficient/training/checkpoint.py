"""Checkpoints: written whole or not at all, read without running code, complete enough to predict with.

A checkpoint is Lightning's, of tensors and plain values only, with one entry more: what the classifier is.
"""

from __future__ import annotations

import errno
import hashlib
import os
import pickle
import sys
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from pytorch_lightning.plugins.io import TorchCheckpointIO
from torch import Tensor

from densenet_efficient.files import FULL_DISK, atomic_write, temporary_of
from densenet_efficient.models import EfficientDenseNet
from densenet_efficient.training.preprocessing import Preprocessing
from densenet_efficient.weights.checkpoints import DAMAGED, ENTRY

REMEDY = "expected a checkpoint written by densenet-efficient fit"
# What a file system without hard links says, such as that of many an external drive.
WITHOUT_HARD_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
MODEL_PREFIX = "model."
LAST, PREVIOUS, BEST = "last.ckpt", "previous.ckpt", "best.ckpt"
# What of a network's configuration may change while it trains. (The classes are compared by name.)
CHANGEABLE = {"drop_rate", "checkpointing", "norm_eps", "num_classes"}


class TrainingImages:
    """Which images a classifier was trained on: a mark of each. A classifier and its checkpoint's entry share it."""

    def __init__(self, marks: Tensor | None = None) -> None:
        self.marks = marks  # int64; None where it is not known, as of a checkpoint of an earlier version

    def begin(self, trainer: Any) -> None:
        """Before the first step: add what is trained on, and warn if an earlier part of the run trained on others."""
        data = trainer.datamodule
        if data is None or self.marks is None:
            self.marks = None
            return
        added = marks_of(data.splits.train.sources, data.root)
        # Without those that are still trained on: an image may be in a data set twice.
        TrainingImages(self.marks[~torch.isin(self.marks, added)]).warn(trainer)
        self.marks = torch.cat((self.marks, added)).unique()

    def count(self, sources: Iterable[Any], root: Path) -> int | None:
        """How many of these images are among them; None where it is not known."""
        return None if self.marks is None else int(torch.isin(marks_of(sources, root), self.marks).sum())

    def warn(self, trainer: Any) -> None:
        """Say how many of the validation images are among them, if any."""
        if trainer.datamodule is None or not trainer.is_global_zero:
            return
        sources = trainer.datamodule.splits.validation.sources
        if count := self.count(sources, trainer.datamodule.root):
            print(says_trained_on(count, len(sources), "validation"), file=sys.stderr)


def says_trained_on(count: int, of: int, split: str) -> str:
    return (
        f"the model was trained on {count} of the {of} images of the {split} split, so its figures flatter it; "
        "evaluate it on the images and the split that it was trained with, or on new images alone "
        "(files are told by their path in the data and their size)"
    )


def marks_of(sources: Iterable[Any], root: Path) -> Tensor:
    """Eight bytes of a hash of each image, as int64 [N]."""
    digests = (hashlib.blake2b(_identity(source, root), digest_size=8).digest() for source in sources)
    return torch.tensor([int.from_bytes(digest, "little", signed=True) for digest in digests], dtype=torch.int64)


def _identity(source: Any, root: Path) -> bytes:
    """Of an image in memory its pixels; of a file its path from `root`, which may move, and its size, since the images
    of many a folder are just numbered."""
    if not isinstance(source, str | Path):
        return np.ascontiguousarray(source).tobytes()
    try:
        size = os.stat(source).st_size
    except OSError:  # which reading it explains
        size = 0
    return os.fsencode(str(source).removeprefix(f"{root}{os.sep}")) + b"\0%d" % size


@dataclass(frozen=True)
class SavedClassifier:
    """A classifier as it is stored: its network, its classes, and how its input is made."""

    model: EfficientDenseNet
    class_names: list[str]
    multi_label: bool
    preprocessing: Preprocessing
    trained_on: TrainingImages = field(default_factory=TrainingImages)


def probabilities_of(logits: Tensor, multi_label: bool) -> Tensor:
    """[N, classes], of each class by itself where an image may be of several, else of one of them."""
    return logits.sigmoid() if multi_label else logits.softmax(1)


def describe_classifier(classifier: SavedClassifier) -> dict[str, Any]:
    """The entry of a checkpoint, in plain values."""
    marks = classifier.trained_on.marks
    return {
        "config": classifier.model.config,
        "class_names": list(classifier.class_names),
        "multi_label": classifier.multi_label,
        "preprocessing": classifier.preprocessing.as_dict(),
    } | ({} if marks is None else {"trained_on": marks})


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
            TrainingImages(entry.get("trained_on")),
        )
    except KeyError as error:
        raise RuntimeError(f"{path}: a checkpoint of densenet-efficient, but without its {error}; {REMEDY}") from error
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:
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
    if not Path(path).is_file():
        found = "A folder" if Path(path).is_dir() else "No such file"
        raise FileNotFoundError(errno.ENOENT, f"{found}; {REMEDY}", str(path))
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
    """Raise ValueError if a checkpoint's entry is of other classes, another network or other input than the classifier.

    If it fits, the classifier is one that was trained on the checkpoint's images.
    """
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
    _check_input(path, theirs, ours)
    marks = theirs.get("trained_on")
    ours.trained_on.marks = None if marks is None else marks.cpu()


def _check_input(path: str | Path, theirs: dict[str, Any], ours: SavedClassifier) -> None:
    """The same image must become the same input, and the outputs must be read in the same way."""
    was = Preprocessing.from_dict(theirs["preprocessing"]).as_dict() | {"multi_label": theirs["multi_label"]}
    given = ours.preprocessing.as_dict() | {"multi_label": ours.multi_label}
    differences = [f"{name} {was[name]}, not {value}" for name, value in given.items() if was[name] != value]
    if differences:
        raise ValueError(
            f"{path}: a checkpoint of other input than was given ({'; '.join(differences)}); give the --data options "
            f"it was trained with, as --config {Path(path).parent / 'config.yaml'} does"
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
    link = temporary_of(last.with_name(PREVIOUS))
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
            remedy = "make room" if getattr(system, "errno", None) in FULL_DISK else "mend that"
            raise OSError(
                f"{path}: cannot write this checkpoint ({cause}), {kept}; {remedy}, then continue with --ckpt_path last"
            ) from error

    def load_checkpoint(
        self, path: Any, map_location: Callable[..., Any] | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        content: dict[str, Any] = read_checkpoint(path, map_location or "cpu")
        return content
