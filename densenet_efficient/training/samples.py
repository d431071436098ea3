"""Labelled samples, and how they are divided into splits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from densenet_efficient.training.splits import stratified_split

SPLIT_NAMES = (
    dict.fromkeys(("train", "training"), "train")
    | dict.fromkeys(("val", "valid", "validation"), "validation")
    | dict.fromkeys(("test", "testing"), "test")
)


@dataclass(frozen=True)
class Samples:
    """Where N images come from, and their labels."""

    sources: Sequence[Any] | NDArray[Any]  # paths, or images as arrays
    labels: Tensor  # int64 [N], or float32 [N, classes] of zeros and ones
    groups: Sequence[str] | None = None  # of samples that no split may separate

    def __len__(self) -> int:
        return len(self.sources)

    def subset(self, indices: Sequence[int]) -> Samples:
        return Samples(
            [self.sources[index] for index in indices],
            self.labels[list(indices)],
            None if self.groups is None else [self.groups[index] for index in indices],
        )

    def indicators(self, num_classes: int) -> Tensor:
        """The labels as float32 [N, classes] of zeros and ones."""
        if self.labels.dim() == 2:
            return self.labels
        return torch.nn.functional.one_hot(self.labels, num_classes).float()


@dataclass(frozen=True)
class Splits:
    """What to train on, to validate by and, if there is such, to test with."""

    class_names: list[str]
    train: Samples
    validation: Samples
    test: Samples | None = None
    strays: Mapping[str, str] = field(default_factory=dict, kw_only=True)  # why other files are left out, by path
    notes: Sequence[str] = field(default=(), kw_only=True)  # what to say of the data, which is no error

    def map(self, function: Callable[[Samples], Samples]) -> Splits:
        test = None if self.test is None else function(self.test)
        return replace(self, train=function(self.train), validation=function(self.validation), test=test)

    @property
    def only_test(self) -> bool:
        """Whether there is nothing but images to test with, such as another hospital's."""
        return self.test is not None and not len(self.train) and not len(self.validation)

    def parts(self) -> dict[str, Samples]:
        if self.test is not None and self.only_test:
            return {"test": self.test}
        parts = {"train": self.train, "validation": self.validation}
        return parts if self.test is None else parts | {"test": self.test}


def split(
    class_names: list[str],
    samples: Samples,
    validation_fraction: float,
    test_fraction: float,
    seed: int,
    where: object = "--data",
) -> Splits:
    """Divide the samples, which are `where`, so that each split has its share of each class, and groups stay whole.

    A `test_fraction` of 1 makes test images of all, whatever the other fraction. Raises ValueError if a class would be
    missing in the training or the validation images.
    """
    if test_fraction == 1:
        return only_to_test(class_names, samples)
    or_all = {"validation_fraction": "", "test_fraction": ", or 1 to test with all"}
    for (name, other), fraction in zip(or_all.items(), (validation_fraction, test_fraction), strict=True):
        if not 0 <= fraction < 1:
            raise ValueError(f"{name}: expected a number of at least 0 and below 1{other}, got {fraction}")
    if not 0 < validation_fraction + test_fraction < 1 or validation_fraction == 0:
        raise ValueError(
            "--data.validation_fraction must be above 0 and, together with --data.test_fraction, below 1, so that "
            f"images are left to train on; got {validation_fraction} and {test_fraction}"
        )
    fractions = [1 - validation_fraction - test_fraction, validation_fraction, test_fraction]
    labels = samples.indicators(len(class_names)).double().numpy()
    train, validation, test = (
        samples.subset(part) for part in stratified_split(labels, fractions, seed, samples.groups)
    )
    splits = Splits(class_names, train, validation, test if test_fraction else None)
    fractions_named = "another --data.validation_fraction or --data.test_fraction"
    require_every_class(splits, where, f"more images (or patients) of it, or {fractions_named}")
    return splits


def tests_with_all(where: object, test_fraction: float) -> bool:
    """Whether samples whose splits are named are all to test with. Raises ValueError for another share of them."""
    if test_fraction not in (0, 1):
        raise ValueError(
            f"{where}: names its splits, of which --data.test_fraction takes nothing: expected 0, or 1 to test with "
            f"all, got {test_fraction}; give --data.test_fraction 0 where a recipe takes a share"
        )
    return test_fraction == 1


def only_to_test(class_names: list[str], samples: Samples) -> Splits:
    """All of them to test with, none to train on."""
    none = samples.subset([])
    return Splits(class_names, none, none, samples)


def require_several_classes(where: object, names: list[str], remedy: str = "") -> None:
    """Raise ValueError unless there are two at least."""
    if len(names) < 2:
        raise ValueError(f"{where}: expected at least 2 classes, found only {', '.join(names) or 'none'}{remedy}")


def require_every_class(splits: Splits, where: object, remedy: str) -> None:
    """Raise ValueError if a class has no image in one of the splits."""
    for part, samples in splits.parts().items():
        counts = samples.indicators(len(splits.class_names)).sum(0)
        missing = [name for name, count in zip(splits.class_names, counts, strict=True) if count == 0]
        if missing:
            raise ValueError(f"{where}: class {', '.join(missing)}: no image in the {part} split; it needs {remedy}")
