"""Labelled images to train on: scikit-learn's handwritten digits, or a folder with one subfolder a class."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

HELD_OUT_FRACTION = 0.2

Transform = Callable[[Any], Any]


@dataclass(frozen=True)
class Preprocessing:
    """What happens to an image before the model sees it. A checkpoint holds it, for `predict`."""

    mode: str  # "L" for one channel, "RGB" for three
    sizes: tuple[int, ...]  # pixels of the shorter side; the image is resized to each in turn, then cropped square
    mean: tuple[float, ...]  # one value per channel, of images in [0, 1]
    std: tuple[float, ...]

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        return len(self.mean), self.sizes[-1], self.sizes[-1]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def transform(self, *augmentation: Transform) -> Transform:
        """From a PIL image to a float32 tensor [C, H, W]. An augmentation takes the place of the resizing."""
        resize = [v2.Resize(size) for size in self.sizes]
        return v2.Compose(
            [
                *(augmentation or (*resize, v2.CenterCrop(self.sizes[-1]))),
                v2.ToImage(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(self.mean, self.std),
            ]
        )


# The digits were recorded at 8x8. A larger image goes through 8x8 too, to look like what was trained on.
DIGITS = Preprocessing(mode="L", sizes=(8, 16), mean=(0.305,), std=(0.376,))
# Inverted too, so that ink on paper is recognised as well as the white on black of the data.
DIGITS_AUGMENTATION = v2.Compose(
    [
        v2.Resize(16),
        v2.RandomAffine(degrees=10, translate=(1 / 16, 1 / 16), scale=(0.9, 1.1)),
        v2.RandomInvert(),
    ]
)


def photographs(image_size: int) -> Preprocessing:
    """The preprocessing of colour images of any size, with ImageNet's mean and standard deviation."""
    return Preprocessing(mode="RGB", sizes=(image_size,), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


class LabelledImages(Dataset[tuple[Tensor, int]]):
    """Transformed images and class indices. `read` makes a PIL image of a source, such as a path."""

    def __init__(self, sources: Sequence[Any], labels: Sequence[int], read: Transform, transform: Transform) -> None:
        self.sources, self.labels, self.read, self.transform = sources, labels, read, transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.read(self.sources[index])), self.labels[index]


@dataclass(frozen=True)
class ImageData:
    """Images to train on, held-out images to judge by, and what both need to be understood."""

    train: LabelledImages
    held_out: LabelledImages
    class_names: list[str]
    preprocessing: Preprocessing


def load_data(data: str, image_size: int, seed: int) -> ImageData:
    """The digits, or a folder (see `load_folder`). `seed` draws the held-out images."""
    return load_digits(seed) if data == "digits" else load_folder(Path(data), image_size, seed)


def load_digits(seed: int) -> ImageData:
    """scikit-learn's 1797 handwritten digits, 8x8 pixels of 0 to 16, here enlarged to 16x16."""
    from sklearn import datasets

    digits = datasets.load_digits()
    images = [Image.fromarray(pixels) for pixels in (digits.images * (255 / 16)).astype("uint8")]
    labels = [int(label) for label in digits.target]
    names = [str(name) for name in digits.target_names]
    return _hold_out(images, labels, names, DIGITS, lambda image: image, DIGITS_AUGMENTATION, seed)


def load_folder(folder: Path, image_size: int, seed: int) -> ImageData:
    """One subfolder of images per class, either directly in `folder` or in its subfolders `train` and `val`.

    Without `train` and `val`, a fifth of each class is held out. Raises FileNotFoundError for a folder
    without images, and ValueError where `train` and `val` have different classes.
    """
    preprocessing = photographs(image_size)
    augmentation = v2.Compose([v2.RandomResizedCrop(image_size, scale=(0.35, 1.0)), v2.RandomHorizontalFlip()])

    def read(path: str) -> Image.Image:
        return read_image(path, preprocessing.mode)

    if not (folder / "train").is_dir():
        names, paths, labels = _list_folder(folder)
        return _hold_out(paths, labels, names, preprocessing, read, augmentation, seed)
    names, paths, labels = _list_folder(folder / "train")
    held_out_names, held_out_paths, held_out_labels = _list_folder(folder / "val")
    if names != held_out_names:
        unpaired = ", ".join(sorted(set(names) ^ set(held_out_names)))
        raise ValueError(f"{folder}: expected the same classes in train and val, but only one of them has {unpaired}")
    return ImageData(
        train=LabelledImages(paths, labels, read, preprocessing.transform(augmentation)),
        held_out=LabelledImages(held_out_paths, held_out_labels, read, preprocessing.transform()),
        class_names=names,
        preprocessing=preprocessing,
    )


def read_image(path: str | Path, mode: str) -> Image.Image:
    """The image file `path` in PIL's `mode`. Raises OSError if it is missing, ValueError if it is damaged."""
    with open(path, "rb") as file:
        try:
            image = Image.open(file)
            image.load()
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise ValueError(f"{path}: expected an image file such as PNG or JPEG, undamaged ({error})") from error
    if image.mode[0] in "IF":
        raise ValueError(f"{path}: expected 8 bits per channel, got PIL mode {image.mode}; convert it first")
    return ImageOps.exif_transpose(image).convert(mode)


def _list_folder(folder: Path) -> tuple[list[str], list[str], list[int]]:
    """Class names, paths and labels."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; expected digits, or a folder with one subfolder a class")
    found = ImageFolder(folder)
    return found.classes, [path for path, _ in found.samples], found.targets


def _hold_out(
    sources: Sequence[Any],
    labels: Sequence[int],
    class_names: list[str],
    preprocessing: Preprocessing,
    read: Transform,
    augmentation: Transform,
    seed: int,
) -> ImageData:
    """Hold out the same fraction of each class, drawn by `seed`."""
    generator = torch.Generator().manual_seed(seed)
    train: list[int] = []
    held_out: list[int] = []
    for label, name in enumerate(class_names):
        members = torch.tensor([index for index, other in enumerate(labels) if other == label])
        if len(members) < 2:
            raise ValueError(f"class {name}: expected at least 2 images, to hold one out, got {len(members)}")
        order = members[torch.randperm(len(members), generator=generator)].tolist()
        count = max(1, round(HELD_OUT_FRACTION * len(order)))
        held_out += order[:count]
        train += order[count:]

    def select(indices: list[int], transform: Transform) -> LabelledImages:
        return LabelledImages(
            [sources[index] for index in indices], [labels[index] for index in indices], read, transform
        )

    return ImageData(
        train=select(train, preprocessing.transform(augmentation)),
        held_out=select(held_out, preprocessing.transform()),
        class_names=class_names,
        preprocessing=preprocessing,
    )
