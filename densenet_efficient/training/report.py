"""The report of a run: report.html, which opens offline, the same pictures as PNG, and the figures as JSON."""

from __future__ import annotations

import base64
import json
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jinja2 import Environment

from densenet_efficient.files import atomic_write
from densenet_efficient.inspection import grad_cam
from densenet_efficient.training.check import printable
from densenet_efficient.training.classifier import Classifier
from densenet_efficient.training.data import ImageData
from densenet_efficient.training.evaluation import Evaluation, worst_mistakes
from densenet_efficient.training.pictures import (
    Mistake,
    draw_calibration,
    draw_confusion,
    draw_curves,
    draw_mistakes,
    draw_roc,
)

METRICS, PAGE = "metrics.json", "report.html"
MAX_MISTAKES = 12
PACKAGES = ("densenet-efficient", "torch", "torchvision", "pytorch-lightning")


def write_report(
    output: Path, evaluation: Evaluation, metrics: Mapping[str, Any], mistakes: Sequence[Mistake], config: str
) -> list[str]:
    """Write the pictures, then metrics.json and report.html; return all names. `config` is the run's YAML."""
    summary, history = metrics["evaluation"], metrics.get("history", [])
    areas = {name: entry["auroc"]["value"] for name, entry in summary["classes"].items()}
    pictures = {"curves.png": lambda path: draw_curves(history, path)} if history else {}
    if not evaluation.multi_label:
        pictures["confusion.png"] = lambda path: draw_confusion(evaluation, path)
    pictures["roc.png"] = lambda path: draw_roc(evaluation, areas, path)
    pictures["calibration.png"] = lambda path: draw_calibration(evaluation, path)
    if mistakes:
        pictures["mistakes.png"] = lambda path: draw_mistakes(mistakes, path)
    for name, draw in pictures.items():
        draw(output / name)
    write_text(output / METRICS, json.dumps(metrics, indent=2, default=str))
    write_text(output / PAGE, _page(output, list(pictures), metrics, mistakes, config))
    return [*pictures, METRICS, PAGE]


def write_text(path: Path, text: str) -> None:
    """In UTF-8, which the name of a file need not be."""
    with atomic_write(path) as file:
        file.write(printable(text).encode())


def versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}


def collect_mistakes(classifier: Classifier, data: ImageData, evaluation: Evaluation) -> list[Mistake]:
    """The most confident mistakes, with their images as the model saw them."""
    chosen = worst_mistakes(evaluation, MAX_MISTAKES)
    if not chosen:
        return []
    transform = data.preprocessing.transform()
    images = torch.stack([transform(data.read_source(evaluation.sources[image])) for image, _, _ in chosen])
    classes = torch.tensor([given for _, given, _ in chosen])
    model = classifier.model.eval()
    weight = next(model.parameters())  # of another type than the images after --trainer.precision 64-true and its like
    maps = grad_cam(model, images.to(weight), classes=classes.to(weight.device))[:, None].float()
    activations = F.interpolate(maps, images.shape[2:], mode="bilinear")[:, 0].cpu().numpy()
    visible: Any = data.preprocessing.shown(images).permute(0, 2, 3, 1).numpy().astype(np.float32)
    return [
        Mistake(visible[row], activations[row], _caption(evaluation, *chosen[row]), _source(evaluation, chosen[row][0]))
        for row in range(len(chosen))
    ]


def _caption(evaluation: Evaluation, image: int, given: int, right: int) -> str:
    names, probabilities = evaluation.class_names, evaluation.probabilities[image]
    if evaluation.multi_label:
        truth = "is there" if evaluation.labels[image, given] else "is not there"
        return f"{names[given]} {truth}, given {probabilities[given]:.0%}"
    return f"{names[right]} ({probabilities[right]:.0%})\ntaken for {names[given]} ({probabilities[given]:.0%})"


def _source(evaluation: Evaluation, image: int) -> str:
    source = evaluation.sources[image]
    return source if isinstance(source, str) else f"image {image} of the {evaluation.split} split"


def _page(
    output: Path, pictures: Sequence[str], metrics: Mapping[str, Any], mistakes: Sequence[Mistake], config: str
) -> str:
    template = files("densenet_efficient.training").joinpath("report.html.j2").read_text()
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["percent"] = lambda value: "n/a" if value is None else f"{100 * value:.1f}"
    environment.filters["area"] = lambda value: "n/a" if value is None else f"{value:.3f}"
    images = {name: base64.b64encode((output / name).read_bytes()).decode() for name in pictures}
    return environment.from_string(template).render(
        metrics=metrics, evaluation=metrics["evaluation"], images=images, mistakes=mistakes, config=config
    )
