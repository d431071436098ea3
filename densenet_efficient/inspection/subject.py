"""What is looked into: a network from a checkpoint or by name, and how an image file becomes its input."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from densenet_efficient.models import EfficientDenseNet, create_model
from densenet_efficient.training.checkpoint import load_classifier
from densenet_efficient.training.preprocessing import Preprocessing, normalisation


@dataclass(frozen=True)
class Subject:
    """A network in evaluation mode, with its preprocessing and, where they are known, its class names."""

    model: EfficientDenseNet
    preprocessing: Preprocessing
    class_names: list[str] | None
    multi_label: bool = False

    def read(self, path: Path) -> Tensor:
        """The model's input [1, C, H, W]. Raises as `read_image` does."""
        image: Tensor = self.preprocessing.transform()(self.preprocessing.read(path))
        return image[None]

    def class_index(self, name: str) -> int:
        """The class of this name or, where it is no name, of this index. Raises ValueError if there is none."""
        if self.class_names is not None and name in self.class_names:
            return self.class_names.index(name)
        classes = self.model.classifier.out_features
        if not name.isdecimal() or int(name) >= classes:
            known = f", or one of {', '.join(self.class_names[:10])}" if self.class_names else ""
            raise ValueError(f"unknown class {name!r}; expected a number from 0 to {classes - 1}{known}")
        return int(name)

    def class_name(self, index: int) -> str:
        """What to call a class."""
        return f"class {index}" if self.class_names is None else self.class_names[index]


def from_checkpoint(path: Path) -> Subject:
    """The network that `densenet-efficient fit` wrote. Raises as `load_classifier` does."""
    checkpoint = load_classifier(path)
    return Subject(checkpoint.model.eval(), checkpoint.preprocessing, checkpoint.class_names, checkpoint.multi_label)


def from_name(name: str, weights: str | None, image_size: int) -> Subject:
    """A network of `create_model`, with torchvision's ``weights`` or fresh ones.

    Raises:
        ValueError: there is no such network, or no such weights for it.
    """
    if weights is None:
        return Subject(create_model(name).eval(), _photographs(image_size), None)
    if not name.startswith("densenet") or "-" in name:
        raise ValueError(f"torchvision has no weights for {name}; leave --weights out")
    model = create_model(name, weights=weights).eval()
    meta = model.weights.meta if model.weights is not None else {}
    return Subject(model, _photographs(image_size), meta.get("categories"))


def _photographs(image_size: int) -> Preprocessing:
    """That of ImageNet: the central seven eighths."""
    mean, std = normalisation(3)
    return Preprocessing(3, image_size, mean, std, resize=(round(image_size * 256 / 224),))
