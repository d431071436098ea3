"""Classify image files with a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from densenet_efficient.training.checkpoint import Checkpoint
from densenet_efficient.training.data import read_image

Ranking = list[tuple[str, float]]  # class name and probability, the most probable first


@torch.inference_mode()
def classify(checkpoint: Checkpoint, paths: Sequence[Path], top: int = 3) -> Iterator[tuple[Path, Ranking]]:
    """The `top` classes of each image file. Raises as `read_image` does, before the first answer."""
    transform = checkpoint.preprocessing.transform()
    images = [transform(read_image(path, checkpoint.preprocessing.mode)) for path in paths]
    model = checkpoint.model.eval()
    for path, image in zip(paths, images, strict=True):
        probabilities = model(image[None]).softmax(1)[0]
        best = probabilities.topk(min(top, len(probabilities)))
        names = [checkpoint.class_names[index] for index in best.indices]
        yield path, list(zip(names, best.values.tolist(), strict=True))
