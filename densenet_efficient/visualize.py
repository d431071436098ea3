"""The pictures of a training run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from densenet_efficient.training.files import atomic_write
from densenet_efficient.training.loop import EpochRecord

# Two colours of Okabe and Ito's palette, which colour-blind readers tell apart.
BLUE, ORANGE = "#0072B2", "#D55E00"


def draw_curves(history: Sequence[EpochRecord], path: Path) -> None:
    """Loss and accuracy per epoch, of the training and the held-out images, as a PNG at `path`."""
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    losses, accuracies = figure.subplots(1, 2)
    for prefix, style in (
        ("train", {"color": ORANGE, "linestyle": "--", "label": "training (augmented, smoothed labels)"}),
        ("held_out", {"color": BLUE, "label": "held out"}),
    ):
        epochs = [record.epoch for record in history]
        loss = [getattr(record, f"{prefix}_loss") for record in history]
        percent = [100 * getattr(record, f"{prefix}_accuracy") for record in history]
        losses.plot(epochs, loss, marker="o", markersize=4, **style)
        accuracies.plot(epochs, percent, marker="o", markersize=4, **style)
    _finish(losses, "Cross-entropy", "epoch")
    _finish(accuracies, "Accuracy (%)", "epoch")
    for axes in (losses, accuracies):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    losses.legend(frameon=False)
    _save(figure, path)


def draw_memory(mib_per_image: Mapping[int, Mapping[str, float]], checkpointing: str, path: Path) -> None:
    """Peak memory per image against depth, naive and efficient, as a PNG at `path`."""
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.subplots()
    depths = sorted(mib_per_image)
    for name, color in (("naive", ORANGE), ("efficient", BLUE)):
        values = [mib_per_image[depth][name] for depth in depths]
        axes.plot(depths, values, color=color, marker="o", linewidth=2)
        end = (depths[-1], values[-1])
        text = f"{name}\n{values[-1]:.1f} MiB"
        axes.annotate(text, end, (8, 0), textcoords="offset points", color=color, verticalalignment="center")
    network = f"DenseNet-BC, growth rate 12, 32x32 images, checkpointing {checkpointing}"
    _finish(axes, "Peak training memory per image (MiB)", f"depth\n{network}")
    axes.set_xticks(depths)
    axes.set_ylim(bottom=0)
    axes.margins(x=0.15)
    _save(figure, path)


def _finish(axes: Axes, title: str, x_label: str) -> None:
    axes.set_title(title, loc="left", size=11)
    axes.set_xlabel(x_label)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.8)
    axes.set_axisbelow(True)


def _save(figure: Figure, path: Path) -> None:
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=150)
