"""The command `densenet-efficient visualize`: one picture of a network."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch

from densenet_efficient.training.checkpoint import probabilities_of

from .maps import feature_maps, feature_reuse, first_filters, grad_cam
from .pictures import draw_filters, draw_grad_cam, draw_maps, draw_reuse
from .subject import Subject, from_checkpoint, from_name


def visualize(options: argparse.Namespace) -> None:
    """Draws what ``options.picture`` names into ``options.output``.

    Raises OSError or ValueError for a file that cannot be read or written, an unknown network, layer or class.
    """
    output: Path = options.output
    if output.suffix.lower() != ".png":
        raise ValueError(f"{output}: the picture is a PNG; give --output a name that ends in .png")
    if not output.absolute().parent.is_dir():
        raise FileNotFoundError(f"{output.parent}: no such folder; make it, or give another --output")
    if options.checkpoint is not None:
        for name in ("weights", "image_size"):
            if getattr(options, name) is not None:
                raise ValueError(f"--{name} goes with --model; a --checkpoint has its own: leave it out")
        subject = from_checkpoint(options.checkpoint)
    else:
        subject = from_name(options.model, options.weights, options.image_size or 224)
    print(f"{PICTURES[options.picture](subject, options)}: {output}")


def _maps(subject: Subject, options: argparse.Namespace) -> str:
    [maps] = feature_maps(subject.model, subject.read(options.image), options.layer)
    shown = maps[: options.channels]
    title = f"{options.layer}: {len(shown)} of {len(maps)} channels, {maps.shape[1]}x{maps.shape[2]}"
    draw_maps(shown, f"{title}\neach from its minimum (dark) to its maximum (bright)", options.output)
    return title


def _grad_cam(subject: Subject, options: argparse.Namespace) -> str:
    images = subject.read(options.image)
    with torch.inference_mode():
        [probabilities] = probabilities_of(subject.model(images), subject.multi_label)
    chosen = int(probabilities.argmax()) if options.class_name is None else subject.class_index(options.class_name)
    [cam] = grad_cam(subject.model, images, options.layer, torch.tensor([chosen]))
    title = f"Grad-CAM of {options.layer} for {subject.class_name(chosen)} ({probabilities[chosen]:.1%})"
    draw_grad_cam(subject.preprocessing.shown(images)[0], cam, title, options.output)
    return title


def _filters(subject: Subject, options: argparse.Namespace) -> str:
    weight = first_filters(subject.model)
    title = f"first convolution: {weight.shape[0]} filters of {weight.shape[2]}x{weight.shape[3]}"
    draw_filters(weight, f"{title}\neach around zero (grey)", options.output)
    return title


def _reuse(subject: Subject, options: argparse.Namespace) -> str:
    reuse = feature_reuse(subject.model)
    draw_reuse(reuse, options.output)
    return f"feature reuse of {len(reuse)} blocks"


PICTURES: dict[str, Callable[[Subject, argparse.Namespace], str]] = {
    "maps": _maps,
    "grad-cam": _grad_cam,
    "filters": _filters,
    "reuse": _reuse,
}
