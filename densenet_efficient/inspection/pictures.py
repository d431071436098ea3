"""The pictures of an inspection, each a PNG."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from densenet_efficient.files import save_figure

Pixels = NDArray[np.float32]


def draw_maps(maps: Tensor, title: str, path: Path) -> None:
    """``maps`` [C, H, W] side by side, each from its own minimum (dark) to its own maximum (bright)."""
    _draw_tiles([_stretched(each) for each in maps], title, path, cmap="viridis")


def draw_filters(weight: Tensor, title: str, path: Path) -> None:
    """Filters [K, C, h, w]: in colour where C is 3, else each channel of each filter in grey; around zero, mid-grey."""
    scaled = (weight / weight.abs().amax((1, 2, 3), keepdim=True).clamp_min(1e-12) + 1) / 2
    in_colour = weight.shape[1] == 3
    tiles = scaled.permute(0, 2, 3, 1) if in_colour else scaled.flatten(0, 1)
    _draw_tiles([_pixels(tile) for tile in tiles], title, path, cmap="gray")


def draw_grad_cam(image: Tensor, cam: Tensor, title: str, path: Path) -> None:
    """``image`` [1 or 3, H, W] in [0, 1], alone and under ``cam`` [H', W'] in [0, 1]."""
    figure = Figure(figsize=(9, 4.6), layout="constrained")
    plain, covered = figure.subplots(1, 2)
    pixels = _pixels(image[0] if len(image) == 1 else image.permute(1, 2, 0))
    for axes in (plain, covered):
        axes.imshow(pixels, cmap="gray", vmin=0, vmax=1)
        axes.set_axis_off()
    extent = (-0.5, image.shape[2] - 0.5, image.shape[1] - 0.5, -0.5)
    covered.imshow(_pixels(cam), cmap="inferno", vmin=0, vmax=1, alpha=0.55, extent=extent, interpolation="bilinear")
    scale = ScalarMappable(Normalize(0, 1), "inferno")
    figure.colorbar(scale, ax=covered, shrink=0.8, label="evidence, of the largest")
    figure.suptitle(title, fontsize=11)
    save_figure(figure, path)


def draw_reuse(reuse: Mapping[str, Tensor], path: Path) -> None:
    """One heat map per block: which earlier layer's features (row) each layer's weights (column) use."""
    columns = min(len(reuse), 2)
    rows = math.ceil(len(reuse) / columns)
    figure = Figure(figsize=(5.4 * columns, 4.9 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, (name, values) in zip(panels, reuse.items(), strict=False):
        _draw_block(figure, axes, name, values)
    for axes in panels[len(reuse) :]:
        axes.set_axis_off()
    figure.suptitle("Feature reuse: mean absolute weight from a source layer to a target layer", fontsize=12)
    save_figure(figure, path)


def _draw_block(figure: Figure, axes: Axes, name: str, values: Tensor) -> None:
    layers = values.shape[1] - 1
    image = axes.imshow(_pixels(values), cmap="viridis", vmin=0)
    axes.axvline(layers - 0.5, color="white", linewidth=2)
    axes.set_title(name, loc="left", size=11)
    axes.set_xlabel("target layer (exit: what consumes the block)")
    axes.set_ylabel("source layer (0: the block's input)")
    step = max(1, math.ceil(layers / 12))
    shown = [*range(0, layers - step // 2, step), layers]
    axes.set_xticks(shown, [*(str(index + 1) for index in shown[:-1]), "exit"])
    axes.set_yticks(range(0, layers + 1, step))
    axes.spines[:].set_visible(False)
    figure.colorbar(image, ax=axes, shrink=0.8)


def _draw_tiles(tiles: list[Pixels], title: str, path: Path, cmap: str) -> None:
    """A square grid of pictures [h, w] or [h, w, 3] of values in [0, 1]."""
    columns = math.ceil(math.sqrt(len(tiles)))
    rows = math.ceil(len(tiles) / columns)
    height, width = tiles[0].shape[:2]
    side = 8.0
    figure = Figure(figsize=(side, side * rows * height / (columns * width) + 0.5), layout="constrained")
    for axes, tile in zip(figure.subplots(rows, columns, squeeze=False).flatten(), tiles, strict=False):
        axes.imshow(tile, cmap=cmap, vmin=0, vmax=1, interpolation="nearest")
    for axes in figure.axes:
        axes.set_axis_off()
    figure.suptitle(title, fontsize=11)
    save_figure(figure, path)


def _stretched(values: Tensor) -> Pixels:
    lowest, highest = values.min(), values.max()
    return _pixels((values - lowest) / (highest - lowest).clamp_min(1e-12))


def _pixels(values: Tensor) -> Pixels:
    pixels: Pixels = values.detach().float().cpu().numpy()
    return pixels
