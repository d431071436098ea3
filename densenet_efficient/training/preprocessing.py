"""What happens to an image between its file and the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms import v2
from torchvision.tv_tensors import Image as ImageTensor

from densenet_efficient.training.images import read_image
from densenet_efficient.training.option_checks import check_above_zero

Transform = Callable[[Any], Any]

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Preprocessing:
    """From an image file to the model's input. A checkpoint holds it, so that `predict` needs nothing else."""

    channels: int  # 1 or 3
    image_size: int  # pixels of each side of the input
    mean: tuple[float, ...]  # one value per channel, of images in [0, 1]
    std: tuple[float, ...]
    resize: tuple[int, ...] = ()  # pixels of the shorter side, each in turn; the last is followed by a central crop
    stretch: bool = False  # to the square as it is, instead of cropping
    value_range: tuple[float, float] | None = None  # what becomes 0 and 1, of images deeper than 8 bits

    def __post_init__(self) -> None:
        if self.value_range is not None and not self.value_range[0] < self.value_range[1]:
            low, high = self.value_range
            raise ValueError(f"--data.value_range: expected the lower number first, got {low:g} {high:g}")

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        return self.channels, self.image_size, self.image_size

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preprocessing:
        """The inverse of `as_dict`, also after a file format has made lists of the tuples."""
        tuples = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
        return cls(**{**values, **tuples})

    def read(self, path: str | Path) -> ImageTensor:
        """The image file `path` for `transform`, as `read_image` gives it; raises as that does."""
        return read_image(path, self.channels, self.value_range)

    def shown(self, inputs: Tensor) -> Tensor:
        """Inputs [N, channels, H, W] as they look, with values in [0, 1]."""
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.mean, self.std))
        return (inputs * std + mean).clamp(0, 1)

    def transform(self, augmentation: Sequence[Transform] = (), fit: Transform | None = None) -> Transform:
        """From a uint8 or float image [channels, H, W] to a float32 input [channels, image_size, image_size].

        `fit` brings the image to its size in place of resizing and cropping; the augmentation comes after it.
        """
        steps = [fit] if fit is not None else self._fit()
        return v2.Compose(
            [*steps, *augmentation, v2.ToDtype(torch.float32, scale=True), v2.Normalize(self.mean, self.std)]
        )

    def _fit(self) -> list[Transform]:
        if self.stretch:
            return [v2.Resize((self.image_size, self.image_size))]
        sizes = self.resize or (self.image_size,)
        return [*(v2.Resize(size) for size in sizes), v2.CenterCrop(self.image_size)]


def normalisation(
    channels: int, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel: those given, else ImageNet's, averaged for one channel.

    Raises ValueError if there is not one value per channel, or a deviation is not above 0.
    """
    result = []
    for name, given, default in (("mean", mean, IMAGENET_MEAN), ("std", std, IMAGENET_STD)):
        values = tuple(given) if given is not None else default if channels == 3 else (sum(default) / 3,)
        if len(values) != channels:
            raise ValueError(f"--data.{name}: expected one {name} per channel, {channels}, got {len(values)}")
        result.append(values)
    for value in result[1]:
        check_above_zero("--data.std", value)
    return result[0], result[1]
