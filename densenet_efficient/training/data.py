"""The data modules: what `--data` may name."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pytorch_lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from densenet_efficient.training.check import find_unreadable, keep_readable, printable
from densenet_efficient.training.folders import read_folder
from densenet_efficient.training.images import what_is_wrong
from densenet_efficient.training.loading import EpochSampler, LabelledImages, ReadingLoader, TrainingLoader
from densenet_efficient.training.option_checks import check_at_least_zero
from densenet_efficient.training.preprocessing import Preprocessing, Transform, normalisation
from densenet_efficient.training.samples import Samples, Splits
from densenet_efficient.training.shared_check import find_unreadable_together
from densenet_efficient.training.signals import end_with_the_run
from densenet_efficient.training.tables import Columns, read_table

Augmentation = Literal["none", "photograph", "medical", "small", "digits"] | list[v2.Transform]


class Task:
    """What a classifier must know of its data. (A plain class: the parser takes dataclasses for groups of options.)"""

    def __init__(
        self,
        class_names: list[str],
        multi_label: bool,  # any number of classes per image, instead of one
        preprocessing: Preprocessing,
        class_weights: Tensor | None = None,  # [classes], of the loss
    ) -> None:
        self.class_names, self.multi_label = class_names, multi_label
        self.preprocessing, self.class_weights = preprocessing, class_weights


class ImageData(LightningDataModule, ABC):
    """Images with labels, of one of the kinds below.

    Args:
        batch_size: images per step and process.
        image_size: pixels of each side of the model's input; None means the data set's own, or 224.
        channels: 3, or 1 for grey images; None means the data set's own, or 3.
        augmentation: none; photograph (random crop and mirroring); medical (slight rotation, shift, zoom and
            contrast); small (the paper's for CIFAR: shift by 4 pixels and mirroring); digits (slight rotation, shift
            and zoom, and inversion); or a list of torchvision.transforms.v2 classes, applied after resizing.
        stretch: fit an image into the square by stretching, instead of by cropping its middle.
        mean: of each channel, of images in [0, 1]; None means the data set's own, or ImageNet's.
        std: the standard deviation likewise.
        value_range: the two values that become black and white in images deeper than 8 bits, in Hounsfield units for
            CT; None means a DICOM file's own window, and the range of 16 bits, to which PGM files of fewer are brought.
        class_weights: weigh the loss of a class by the inverse of its frequency.
        weighted_sampling: draw the images of rare classes as often as the others.
        bad_files: before training, read every image file once and refuse to train if one is damaged, empty or no image;
            or skip such files, naming them, in evaluations too; or do not check.
        num_workers: processes that read images; None means up to 4, and none for data in memory.
        seed: of the splits, the order and the augmentation.
    """

    default_size, default_channels = 224, 3
    default_augmentation: Augmentation = "photograph"
    recorded_size: int | None = None  # through which every image goes, to look like those of the data set
    own_normalisation: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    in_memory = False
    root = Path()  # what the paths of the images are told from

    def __init__(
        self,
        batch_size: int = 32,
        image_size: int | None = None,
        channels: Literal[1, 3] | None = None,
        augmentation: Augmentation | None = None,
        stretch: bool = False,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        value_range: tuple[float, float] | None = None,
        class_weights: bool = False,
        weighted_sampling: bool = False,
        bad_files: Literal["refuse", "skip", "unchecked"] = "refuse",
        num_workers: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if batch_size < 2:
            raise ValueError(
                f"--data.batch_size: expected at least 2, so that a batch has a variance, got {batch_size}"
            )
        check_at_least_zero("--data.num_workers", num_workers or 0)
        if class_weights and weighted_sampling:
            raise ValueError(
                "--data.class_weights and --data.weighted_sampling both make up for rare classes; choose one"
            )
        self.batch_size, self.seed, self.bad_files = batch_size, seed, bad_files
        self.augmentation = augmentation if augmentation is not None else self.default_augmentation
        self.balance_loss, self.weighted_sampling = class_weights, weighted_sampling
        self.num_workers = num_workers if num_workers is not None else self._workers()
        self.preprocessing = self._preprocessing(image_size, channels, mean, std, stretch, value_range)
        self.splits = self.read()
        self.checked = self.in_memory or bad_files == "unchecked"
        if bad_files == "skip":  # at once: how many there are, and what each class weighs, is told by the others
            self._check_files()
        self.training_loader: TrainingLoader | None = None
        self.restored: dict[str, Any] = {}

    @abstractmethod
    def read(self) -> Splits:
        """The samples; of files only their paths."""

    def read_source(self, source: Any) -> Any:
        """The image of one source, uint8 or float in [0, 1], [channels, H, W]."""
        return self.preprocessing.read(source)

    def _read_for_a_batch(self, source: Any) -> Any:
        """The same; of a file that was not checked, or was undamaged then, the error says what to do."""
        try:
            return self.read_source(source)
        except (OSError, ValueError) as error:
            raise type(error)(
                f"{what_is_wrong(source, error)}; replace the file, or leave it out with --data.bad_files skip; "
                "a training then goes on with --ckpt_path last"
            ) from error

    @property
    def task(self) -> Task:
        train = self.splits.train
        multi_label = train.labels.dim() == 2
        counts = train.indicators(len(self.splits.class_names)).sum(0)
        weights = None
        # scikit-learn's "balanced"; of several labels, how much a positive weighs
        if self.balance_loss and not self.splits.only_test:
            others = len(train) - counts if multi_label else torch.full_like(counts, len(train) / len(counts))
            weights = others / counts
        return Task(self.splits.class_names, multi_label, self.preprocessing, weights)

    def setup(self, stage: str) -> None:
        """Before training, check every file once."""
        if stage != "test":
            self.require_training_images()
        if stage == "fit":
            for note in self.splits.notes if self._process()[0] == 0 else ():
                print(printable(note))
            self._check_files()

    def require_training_images(self) -> None:
        """Raise ValueError if there are none, nor any to validate by."""
        if self.splits.only_test:
            raise ValueError(
                "--data: all images are of the test split, by --data.test_fraction 1 or the split column; "
                "evaluate them with the command test, or name images to train on and to validate by"
            )

    def _check_files(self) -> None:
        if not self.checked:
            self.splits = keep_readable(self.splits, self._find_unreadable, skip=self.bad_files == "skip")
            self.checked = True

    def _find_unreadable(self, paths: Sequence[str]) -> dict[str, str]:
        """Of several processes each reads a share. (They know of each other only once there is a trainer.)"""
        trainer = self.trainer
        if trainer is None or trainer.world_size == 1:
            return find_unreadable(paths, self.read_source)
        return find_unreadable_together(paths, self.read_source, trainer.local_rank, trainer.num_devices)

    def train_dataloader(self) -> TrainingLoader:
        train = self.splits.train
        rank, world_size = self._process()
        weights = self._sampling_weights() if self.weighted_sampling else None
        sampler = EpochSampler(len(train), self.batch_size, self.seed, weights, rank, world_size)
        dataset = LabelledImages(train, self._read_for_a_batch, self._training_transform())
        self.training_loader = TrainingLoader(dataset, sampler, self.batch_size, **self._loader_options())
        self.training_loader.load_state_dict(self.restored)
        return self.training_loader

    def state_dict(self) -> dict[str, Any]:
        """Where in its epoch the training is. (Lightning asks the loader too, but forgets to tell it again if it was
        made before the loops were restored, as it is to foretell the number of steps.)"""
        return {} if self.training_loader is None else self.training_loader.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.restored = state_dict
        if self.training_loader is not None:
            self.training_loader.load_state_dict(state_dict)

    def val_dataloader(self) -> DataLoader[Any]:
        return self.evaluation_loader(self.splits.validation)

    def test_dataloader(self) -> DataLoader[Any]:
        return self.evaluation_loader(self.test_samples)

    @property
    def test_samples(self) -> Samples:
        """The test split; the validation split where there is none."""
        return self.splits.validation if self.splits.test is None else self.splits.test

    def evaluation_loader(self, samples: Samples) -> DataLoader[Any]:
        """All images once, in order; of several processes each takes every world-size-th."""
        rank, world_size = self._process()
        if world_size > 1:
            samples = samples.subset(range(rank, len(samples), world_size))
        dataset = LabelledImages(samples, self._read_for_a_batch, self.preprocessing.transform())
        return ReadingLoader(dataset, batch_size=self.batch_size, **self._loader_options())

    def _process(self) -> tuple[int, int]:
        """The rank of this process, and how many there are."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def _loader_options(self) -> dict[str, Any]:
        return {
            "num_workers": self.num_workers,
            "persistent_workers": self.num_workers > 0,
            "worker_init_fn": end_with_the_run,
            "pin_memory": torch.cuda.is_available(),
        }

    def _workers(self) -> int:
        return 0 if self.in_memory else min(4, len(os.sched_getaffinity(0)))

    def _preprocessing(
        self,
        image_size: int | None,
        channels: int | None,
        mean: Sequence[float] | None,
        std: Sequence[float] | None,
        stretch: bool,
        value_range: tuple[float, float] | None,
    ) -> Preprocessing:
        channels = channels or self.default_channels
        size = self.default_size if image_size is None else image_size
        if size < 1:
            raise ValueError(f"--data.image_size: expected at least 1, got {size}")
        own = self.own_normalisation
        if own is not None and channels == len(own[0]):
            mean, std = own[0] if mean is None else mean, own[1] if std is None else std
        mean, std = normalisation(channels, mean, std)
        resize = () if self.recorded_size is None else (self.recorded_size, size)
        return Preprocessing(channels, size, mean, std, resize, stretch, value_range)

    def _sampling_weights(self) -> Tensor:
        """Per image, the inverse frequency of its class; of its rarest one where it has several."""
        labels = self.splits.train.indicators(len(self.splits.class_names))
        return (labels / labels.sum(0)).amax(1).clamp(min=1 / len(labels))

    def _training_transform(self) -> Transform:
        size = self.preprocessing.image_size
        if isinstance(self.augmentation, list):
            return self.preprocessing.transform(self.augmentation)
        if self.augmentation == "photograph":
            crop = v2.RandomResizedCrop(size, scale=(0.35, 1.0))
            return self.preprocessing.transform([v2.RandomHorizontalFlip()], fit=crop)
        return self.preprocessing.transform(AUGMENTATIONS[self.augmentation](size))


# Of an image of the input's size, given its side.
AUGMENTATIONS: dict[str, Any] = {
    "none": lambda size: [],
    "medical": lambda size: [
        v2.RandomAffine(degrees=10, translate=(0.05, 0.05), scale=(0.9, 1.1)),
        v2.ColorJitter(brightness=0.1, contrast=0.1),
    ],
    "small": lambda size: [v2.RandomCrop(size, padding=4), v2.RandomHorizontalFlip()],
    # Inverted too, so that ink on paper is recognised as well as the white on black of the data.
    "digits": lambda size: [
        v2.RandomAffine(degrees=10, translate=(1 / 16, 1 / 16), scale=(0.9, 1.1)),
        v2.RandomInvert(),
    ],
}


class FolderData(ImageData):
    """A folder with one subfolder of images per class, or with such folders in train, val and test.

    Args:
        folder: where the images are.
        validation_fraction: of each class, where there is no val folder.
        test_fraction: likewise; 0 for none, 1 for images to test with only, such as another hospital's.
    """

    def __init__(
        self, folder: Path, validation_fraction: float = 0.2, test_fraction: float = 0.0, **kwargs: Any
    ) -> None:
        self.folder = self.root = Path(folder)
        self.fractions = (validation_fraction, test_fraction)
        super().__init__(**kwargs)

    def read(self) -> Splits:
        return read_folder(self.folder, *self.fractions, self.seed)


class CSVData(ImageData):
    """A CSV table with a header: one row per image, with its path and its labels.

    Args:
        table: the CSV file.
        root: what the paths are relative to; None means the table's folder.
        path_column: the paths.
        label_column: the class, or several with a separator between them.
        label_columns: instead, one column of zeros and ones per class, for any number of classes per image.
        label_separator: between the classes of a cell, for any number of classes per image.
        group_column: such as the patient: no group falls in two splits.
        split_column: says train, val or test for each row; None splits by the fractions.
        validation_fraction: of each class, where no column names the split.
        test_fraction: likewise; 0 for none, 1 for images to test with only, such as another hospital's.
    """

    def __init__(
        self,
        table: Path,
        root: Path | None = None,
        path_column: str = "path",
        label_column: str = "label",
        label_columns: list[str] | None = None,
        label_separator: str | None = None,
        group_column: str | None = None,
        split_column: str | None = None,
        validation_fraction: float = 0.2,
        test_fraction: float = 0.0,
        **kwargs: Any,
    ) -> None:
        self.table = Path(table)
        self.root = self.table.parent if root is None else Path(root)
        if label_columns and label_separator is not None:
            raise ValueError(
                "--data.label_columns and --data.label_separator both tell of several labels per image; choose one"
            )
        if label_separator == "":
            raise ValueError("--data.label_separator: expected what stands between the classes of a cell, got nothing")
        self.columns = Columns(
            path_column, label_column, label_columns or (), label_separator, group_column, split_column
        )
        self.fractions = validation_fraction, test_fraction
        super().__init__(**kwargs)

    def read(self) -> Splits:
        return read_table(self.table, self.root, self.columns, *self.fractions, self.seed)
