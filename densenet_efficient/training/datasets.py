"""Public data sets, for `--data` by name. They are held in memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from densenet_efficient.training.data import Augmentation, ImageData
from densenet_efficient.training.samples import Samples, Splits, split

Pixels = NDArray[np.uint8]  # [N, H, W] or [N, H, W, 3]


class ArrayData(ImageData):
    """Images in memory."""

    in_memory = True
    default_augmentation: Augmentation = "none"

    def read_source(self, source: Any) -> Tensor:
        image = F.to_image(source)
        if image.shape[0] == 3 and self.preprocessing.channels == 1:
            return F.rgb_to_grayscale(image)
        return image.expand(self.preprocessing.channels, -1, -1)


class UndividedData(ArrayData):
    """Images in memory of a data set without validation images.

    Args:
        validation_fraction: of each class of the training images; 0 validates with the test images.
    """

    def __init__(self, validation_fraction: float = 0.1, **kwargs: Any) -> None:
        self.validation_fraction = validation_fraction
        super().__init__(**kwargs)

    def divide(self, class_names: list[str], train: Samples, test: Samples) -> Splits:
        """Holds validation images out of the training images."""
        if self.validation_fraction == 0:
            return Splits(class_names, train, test, test)
        parts = split(class_names, train, self.validation_fraction, 0.0, self.seed)
        return Splits(class_names, parts.train, parts.validation, test)


def array_samples(images: Pixels, labels: Any) -> Samples:
    return Samples(images, torch.as_tensor(np.asarray(labels), dtype=torch.int64))


@contextmanager
def naming_data_set(name: str, root: Path, download: bool) -> Iterator[None]:
    """Whatever fails while this block reads a data set, or fetches it, the error names it, its folder and a remedy."""
    try:
        yield
    except Exception as error:  # torchvision and medmnist raise many kinds
        reason = " ".join(str(error).split()) or type(error).__name__
        remedy = "put its files there, or try again with a network" if download else "--data.download true fetches it"
        raise RuntimeError(f"{name}: not to be had in --data.root {root} ({reason}); {remedy}") from error


class DigitsData(UndividedData):
    """scikit-learn's 1797 handwritten digits: 8x8 pixels, here enlarged to 16x16. Nothing is downloaded.

    Args:
        validation_fraction: of each class.
    """

    default_size, default_channels, recorded_size = 16, 1, 8
    default_augmentation: Augmentation = "digits"
    own_normalisation = (0.305,), (0.376,)

    def __init__(self, validation_fraction: float = 0.2, **kwargs: Any) -> None:
        super().__init__(validation_fraction, **kwargs)

    def read(self) -> Splits:
        from sklearn.datasets import load_digits

        digits = load_digits()
        samples = array_samples((digits.images * (255 / 16)).astype(np.uint8), digits.target)
        return split([str(name) for name in digits.target_names], samples, self.validation_fraction, 0.0, self.seed)


class CIFARData(UndividedData):
    """CIFAR-10 or CIFAR-100 through torchvision: 50,000 training and 10,000 test images of 32x32.

    Args:
        classes: 10 or 100.
        root: where the data set is, or is downloaded to.
        download: fetch it if it is not there.
        validation_fraction: of each class of the training images; 0 validates with the test images, as the paper's
            final runs do.
    """

    default_size = 32
    default_augmentation: Augmentation = "small"
    own_normalisation = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)

    def __init__(
        self,
        classes: Literal[10, 100] = 10,
        root: Path = Path("data"),
        download: bool = True,
        validation_fraction: float = 0.1,
        **kwargs: Any,
    ) -> None:
        self.classes, self.root, self.download = classes, root, download
        super().__init__(validation_fraction, **kwargs)

    def read(self) -> Splits:
        from torchvision.datasets import CIFAR10, CIFAR100

        kind = CIFAR10 if self.classes == 10 else CIFAR100
        with naming_data_set(kind.__name__, self.root, self.download):
            train, test = (kind(self.root, train=part, download=self.download) for part in (True, False))
        parts = [array_samples(part.data, part.targets) for part in (train, test)]
        return self.divide(list(train.classes), *parts)


class SVHNData(UndividedData):
    """Street View House Numbers through torchvision: 73,257 training, 531,131 additional and 26,032 test images of
    32x32.

    Args:
        root: where the data set is, or is downloaded to.
        download: fetch it if it is not there.
        extra: train on the additional images too, as the paper does.
        validation_fraction: of each class of the training images; 0 validates with the test images.
    """

    default_size = 32
    own_normalisation = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)  # the paper only divides by 255

    def __init__(
        self,
        root: Path = Path("data"),
        download: bool = True,
        extra: bool = False,
        validation_fraction: float = 0.1,
        **kwargs: Any,
    ) -> None:
        self.root, self.download, self.extra = root, download, extra
        super().__init__(validation_fraction, **kwargs)

    def read(self) -> Splits:
        from torchvision.datasets import SVHN

        names = ["train", "extra"] if self.extra else ["train"]
        with naming_data_set("SVHN", self.root, self.download):
            train = [SVHN(self.root, split=name, download=self.download) for name in names]
            test = SVHN(self.root, split="test", download=self.download)
        images = np.concatenate([part.data for part in train])
        labels = np.concatenate([part.labels for part in train])
        classes = [str(digit) for digit in range(10)]
        return self.divide(
            classes,
            array_samples(images.transpose(0, 2, 3, 1), labels),
            array_samples(test.data.transpose(0, 2, 3, 1), test.labels),
        )


class MedMNISTData(ArrayData):
    """One of the 2D data sets of MedMNIST v2 (Yang et al. 2023), through its package, with its own three splits.

    Args:
        name: such as pneumoniamnist, pathmnist, chestmnist (several labels per image).
        root: where the data set is, or is downloaded to.
        download: fetch it if it is not there.
        recorded: pixels of each side of the images: 28, 64, 128 or 224.
    """

    default_size = 28

    def __init__(
        self,
        name: str,
        root: Path = Path("data"),
        download: bool = True,
        recorded: Literal[28, 64, 128, 224] = 28,
        **kwargs: Any,
    ) -> None:
        self.name, self.root, self.download, self.recorded = name, root, download, recorded
        self.default_size = recorded
        super().__init__(**kwargs)

    def read(self) -> Splits:
        try:
            import medmnist
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(f"{error}; pip install 'densenet-efficient[medmnist]' brings it") from error

        flat = [name for name, info in medmnist.INFO.items() if not name.endswith("3d")]
        if self.name not in flat:
            raise ValueError(f"--data.name {self.name}: expected one of {', '.join(flat)}")
        info = medmnist.INFO[self.name]
        kind = getattr(medmnist, info["python_class"])
        with naming_data_set(f"MedMNIST's {self.name}", self.root, self.download):
            self.root.mkdir(parents=True, exist_ok=True)
            parts = [
                kind(split=part, root=str(self.root), download=self.download, size=self.recorded)
                for part in ("train", "val", "test")
            ]
        multi_label = info["task"].startswith("multi-label")
        samples = [
            Samples(part.imgs, torch.as_tensor(part.labels, dtype=torch.float32))
            if multi_label
            else array_samples(part.imgs, part.labels[:, 0])
            for part in parts
        ]
        return Splits(list(info["label"].values()), *samples)
