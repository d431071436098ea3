"""Samples in folders, with one subfolder of images per class."""

from __future__ import annotations

import os
from collections.abc import Container, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from densenet_efficient.training.images import is_image
from densenet_efficient.training.samples import (
    SPLIT_NAMES,
    Samples,
    Splits,
    only_to_test,
    require_several_classes,
    split,
    tests_with_all,
)

# Which file managers, archives and storage devices leave among images, in any case of letters.
SYSTEM_FILES = {"thumbs.db", "desktop.ini", "@eadir", "__macosx", "$recycle.bin"}
MAX_FOLDERS_NAMED = 10  # by a note
OTHER_TYPE = "of another type, by its name"


def read_folder(folder: Path, validation_fraction: float, test_fraction: float, seed: int) -> Splits:
    """One subfolder of images per class, either directly in `folder` or in its subfolders train, val and test.

    Raises FileNotFoundError if there is no such folder, or of train, val and test only some; ValueError for a class
    without images or one that is missing in val or test, and for a share to test with where val or test are there.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; expected one with a subfolder of images per class")
    folders = _split_folders(folder)
    notes = _notes_on_others(folder, set(folders.values())) if folders else []
    if folders and "train" not in folders:
        raise FileNotFoundError(
            f"{folder}: found {', '.join(path.name for path in _visible_folders(folder))}, but no train beside them; "
            "expected train, val and, if there is such, test, each with a subfolder of images per class; "
            "rename the one to train on, or give a single one itself"
        )
    train_folder = folders.pop("train", None)
    names, train, strays = _list_classes(train_folder or folder)
    require_several_classes(folder, names, "; give the folder whose subfolders are the classes")
    if train_folder is None:
        return replace(split(names, train, validation_fraction, test_fraction, seed, folder), strays=strays)
    strays |= _stray_images(folder)
    parts = {}
    for part, path in folders.items():
        other_names, parts[part], others = _list_classes(path)
        strays |= others
        _require_same_classes(train_folder, names, path, other_names)
    if tests_with_all(folder, test_fraction):
        every = [train, *parts.values()]
        whole = Samples([path for part in every for path in part.sources], torch.cat([part.labels for part in every]))
        return replace(only_to_test(names, whole), strays=strays, notes=notes)
    if "validation" not in parts:
        raise FileNotFoundError(
            f"{folder}: found {train_folder.name}, but no val beside it; add one, or give {train_folder} itself"
        )
    return Splits(names, train, **parts, strays=strays, notes=notes)


def _split_folders(folder: Path) -> dict[str, Path]:
    """The subfolders that are named after a split, by split."""
    folders: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        part = SPLIT_NAMES.get(path.name.lower())
        if part is None or not path.is_dir():
            continue
        if part in folders:
            raise ValueError(
                f"{folder}: {folders[part].name} and {path.name} both name the {part} split; put their images into one"
            )
        folders[part] = path
    return folders


def _require_same_classes(train: Path, names: list[str], other: Path, other_names: list[str]) -> None:
    if unknown := sorted(set(other_names) - set(names)):
        raise ValueError(
            f"{other / unknown[0]}: class {', '.join(unknown)} is not in {train}; add it there or remove it"
        )
    if missing := sorted(set(names) - set(other_names)):
        raise ValueError(f"{other}: class {', '.join(missing)} of {train} is missing; add images of it")


def _visible_folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not _is_hidden(path))


def _list_classes(folder: Path) -> tuple[list[str], Samples, dict[str, str]]:
    """Class names in alphabetical order, the images of each class in order of their paths, and why others are none."""
    classes = _visible_folders(folder)
    if not classes:
        raise ValueError(f"{folder}: expected one subfolder of images per class, found none")
    paths: list[str] = []
    labels: list[int] = []
    strays = _stray_images(folder)
    for label, directory in enumerate(classes):
        if directory.name.encode(errors="ignore").decode() != directory.name:  # of no use in a report's pictures
            raise ValueError(f"{folder}: class folder {os.fsencode(directory.name)!r}: not a name in UTF-8; rename it")
        images, others = list_files(directory)
        if not images:
            raise ValueError(f"{directory}: no image in this class folder; add images of it, or remove the folder")
        paths += map(str, images)
        labels += [label] * len(images)
        strays |= {str(path): f"{path}: {OTHER_TYPE}" for path in others}
    return [path.name for path in classes], Samples(paths, torch.tensor(labels)), strays


def _stray_images(folder: Path) -> dict[str, str]:
    """Why the images beside the class folders are left out. (Beside them there may well be other files.)"""
    files = (path for path in sorted(folder.iterdir()) if path.is_file() and not _is_hidden(path))
    return {str(path): f"{path}: in no class folder" for path in files if is_image(path)}


def _notes_on_others(folder: Path, splits: Container[Path]) -> list[str]:
    """What to say of the images in other folders beside those of the splits, if there are any."""
    counts = {path.name: sum(map(_seems_image, _walk(path))) for path in _visible_folders(folder) if path not in splits}
    found = [f"{name} ({count})" for name, count in counts.items() if count]
    if not found:
        return []
    more = [f"and {len(found) - MAX_FOLDERS_NAMED} more"] if len(found) > MAX_FOLDERS_NAMED else []
    where = ", ".join(found[:MAX_FOLDERS_NAMED] + more)
    return [
        f"{folder}: {sum(counts.values())} images in other folders beside the splits are left out, in {where}; "
        "to use them, move them into the class folders of a split"
    ]


def _seems_image(path: Path) -> bool:
    """Whether a file is an image; not, if it may not be read."""
    try:
        return path.is_file() and is_image(path)
    except OSError:
        return False


def _is_hidden(path: Path) -> bool:
    return path.name.startswith(".") or path.name.lower() in SYSTEM_FILES


def list_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """The images below `folder`, and the other files, in order. Hidden ones and the system's own are left out.

    A link to nothing is among the images: reading it says what is wrong.
    """
    images: list[Path] = []
    others: list[Path] = []
    for path in sorted(_walk(folder)):
        leads_nowhere = path.is_symlink() and not path.exists()
        if leads_nowhere or path.is_file():
            (images if leads_nowhere or is_image(path) else others).append(path)
    return images, others


def _walk(folder: Path) -> Iterator[Path]:
    """What lies below `folder` and is no folder. Links to folders are followed, but to each folder once: no cycle."""
    seen: set[str] = set()
    for directory, subfolders, names in os.walk(folder, followlinks=True):
        actual = os.path.realpath(directory)
        if actual in seen:
            subfolders.clear()
            continue
        seen.add(actual)
        subfolders[:] = sorted(name for name in subfolders if not _is_hidden(Path(name)))
        yield from (path for path in (Path(directory, name) for name in names) if not _is_hidden(path))
