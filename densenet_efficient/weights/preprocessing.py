"""How images become the inputs that weights were trained with."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..optional import needed


@dataclass(frozen=True)
class Preprocessing:
    """Resize the shorter side, crop the centre, scale to [0, 1], normalise; all that JSON can hold.

    Args:
        resize_size: pixels of the shorter side.
        crop_size: pixels of both sides of the crop.
        mean, std: per channel, of values in [0, 1].
        interpolation: as torchvision's ``InterpolationMode`` calls it.
    """

    resize_size: int
    crop_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bilinear"

    def transforms(self) -> Callable[[Any], Any]:
        """The same as torchvision's weights have: images, or uint8 [.., C, H, W], to float32 [.., C, crop, crop].

        Raises:
            ImportError: torchvision is not installed.
        """
        presets = needed("torchvision.transforms._presets", "hub")
        mode = needed("torchvision.transforms", "hub").InterpolationMode(self.interpolation)
        settings = asdict(self) | {"interpolation": mode}
        return presets.ImageClassification(**settings)

    @classmethod
    def of_transforms(cls, transforms: Any) -> Preprocessing:
        """That of one of torchvision's weights, from their ``transforms()``."""
        sizes = (transforms.resize_size[0], transforms.crop_size[0])
        return cls(*sizes, tuple(transforms.mean), tuple(transforms.std), transforms.interpolation.value)

    @classmethod
    def of_timm(cls, pretrained_cfg: Mapping[str, Any]) -> Preprocessing:
        """That of timm's ``pretrained_cfg``, as its ``create_transform`` evaluates.

        Raises:
            ValueError: it crops otherwise than a square from the centre.
        """
        _, height, width = pretrained_cfg["input_size"]
        if height != width or pretrained_cfg.get("crop_mode", "center") != "center":
            raise ValueError(f"expected a square crop from the centre, got {dict(pretrained_cfg)}")
        resized = math.floor(height / pretrained_cfg["crop_pct"])
        mean, std = tuple(pretrained_cfg["mean"]), tuple(pretrained_cfg["std"])
        return cls(resized, height, mean, std, pretrained_cfg["interpolation"])
