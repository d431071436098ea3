"""The pictures of a training run, each a PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from densenet_efficient.files import save_figure
from densenet_efficient.training.evaluation import Evaluation, calibration, confusion, roc_curve

# Two colours of Okabe and Ito's palette, which colour-blind readers tell apart.
BLUE, ORANGE = "#0072B2", "#D55E00"
GREY = "#999999"
MAX_CURVES = 8  # lines that a reader tells apart
MAX_WRITTEN_CLASSES = 20  # whose counts are written into the confusion matrix


def draw_curves(history: Sequence[Mapping[str, float]], path: Path) -> None:
    """Loss and accuracy per epoch, of the training and the validation images, as a PNG at `path`."""
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    losses, accuracies = figure.subplots(1, 2)
    epochs = [record["epoch"] for record in history]
    for prefix, style in (
        ("train", {"color": ORANGE, "linestyle": "--", "label": "training (augmented)"}),
        ("val", {"color": BLUE, "label": "validation"}),
    ):
        loss = [record.get(f"{prefix}_loss", np.nan) for record in history]
        percent = [100 * record.get(f"{prefix}_accuracy", np.nan) for record in history]
        losses.plot(epochs, loss, marker="o", markersize=4, **style)
        accuracies.plot(epochs, percent, marker="o", markersize=4, **style)
    finish(losses, "Loss", "epoch")
    finish(accuracies, "Accuracy (%)", "epoch")
    for axes in (losses, accuracies):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    losses.legend(frameon=False)
    save_figure(figure, path)


def draw_learning_rates(rates: Sequence[float], losses: Sequence[float], suggestion: float, path: Path) -> None:
    """The loss against a growing learning rate, with the one to take."""
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.plot(rates, losses, color=BLUE)
    axes.axvline(suggestion, color=ORANGE, linestyle="--", label=f"suggestion {suggestion:.2g}")
    axes.set_xscale("log")
    finish(axes, "Loss (smoothed)", "learning rate")
    axes.legend(frameon=False)
    save_figure(figure, path)


def draw_confusion(evaluation: Evaluation, path: Path) -> None:
    """The confusion matrix of single labels: counts, coloured by their share of the row."""
    counts, names = confusion(evaluation), [literal(name) for name in evaluation.class_names]
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = min(2 + 0.42 * len(names), 14)
    figure = Figure(figsize=(side + 0.8, side), layout="constrained")
    axes = figure.subplots()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    if len(names) <= MAX_WRITTEN_CLASSES:
        for (row, column), count in np.ndenumerate(counts):
            color = "white" if shares[row, column] > 0.6 else "black" if count else GREY
            axes.text(column, row, str(count), ha="center", va="center", color=color, size=9)
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(names)), names)
    axes.set_title("Confusion matrix", loc="left", size=11)
    axes.set_xlabel("predicted")
    axes.set_ylabel("right")
    axes.spines[:].set_visible(False)
    save_figure(figure, path)


def draw_roc(evaluation: Evaluation, areas: Mapping[str, float | None], path: Path) -> None:
    """One ROC curve per class, with its area; of many classes those with the smallest areas."""
    figure = Figure(figsize=(6.4, 4.6), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color=GREY, linestyle=":", linewidth=1)
    defined = sorted((area, name) for name, area in areas.items() if area is not None)
    for area, name in defined[:MAX_CURVES]:
        column = evaluation.class_names.index(name)
        false, true = roc_curve(evaluation.probabilities[:, column], evaluation.labels[:, column])
        axes.plot(false, true, linewidth=1.6, label=literal(f"{name}  {area:.3f}"), drawstyle="steps-post")
    title = "ROC, each class against the others"
    finish(axes, title if len(defined) <= MAX_CURVES else f"{title}: the {MAX_CURVES} hardest", "false positive rate")
    axes.set_ylabel("true positive rate")
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5), title="area under the curve", fontsize=9)
    save_figure(figure, path)


def draw_calibration(evaluation: Evaluation, path: Path) -> None:
    """How often predictions of each confidence are right, and how many there are."""
    bins, error = calibration(evaluation)
    figure = Figure(figsize=(5.2, 4.6), layout="constrained")
    axes, shares = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    confidence = [entry["confidence"] for entry in bins]
    axes.plot([0, 1], [0, 1], color=GREY, linestyle=":", linewidth=1)
    axes.plot(confidence, [entry["right"] for entry in bins], color=BLUE, marker="o", markersize=4)
    finish(axes, f"Calibration: how often it is right (expected error {error:.3f})", "")
    shares.bar(confidence, [100 * entry["share"] for entry in bins], width=0.03, color=ORANGE)
    finish(shares, "Share of predictions (%)", "confidence")
    axes.set_ylim(-0.02, 1.02)
    axes.set_xlim(0, 1.02)
    save_figure(figure, path)


class Mistake(NamedTuple):
    """A wrong prediction and where it was seen."""

    image: NDArray[np.float32]  # [H, W, 1 or 3], in [0, 1]
    activation: NDArray[np.float32]  # [H, W], in [0, 1]
    caption: str
    source: str  # its path, or its number in the split


def draw_mistakes(mistakes: Sequence[Mistake], path: Path) -> None:
    """Each mistake as it came in, and with where the class given was seen laid over it."""
    columns = min(len(mistakes), 4)
    rows = -(-len(mistakes) // columns)
    figure = Figure(figsize=(3.2 * columns, 2.2 * rows), layout="constrained")
    grid = figure.subplots(rows, 2 * columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for index, mistake in enumerate(mistakes):
        row, column = divmod(index, columns)
        for axes, overlay in ((grid[row, 2 * column], False), (grid[row, 2 * column + 1], True)):
            axes.imshow(mistake.image.squeeze(), cmap="gray", vmin=0, vmax=1)
            if overlay:
                axes.imshow(mistake.activation, cmap="inferno", alpha=0.5, vmin=0, vmax=1)
        grid[row, 2 * column].set_title(literal(mistake.caption), loc="left", size=8)
    save_figure(figure, path)


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
    finish(axes, "Peak training memory per image (MiB)", f"depth\n{network}")
    axes.set_xticks(depths)
    axes.set_ylim(bottom=0)
    axes.margins(x=0.15)
    save_figure(figure, path)


def literal(text: str) -> str:
    """A text of the user's as matplotlib is to be given it, which sets `$...$` as mathematics otherwise.

    It leaves a label that begins with an underscore out of its legends; a space without width goes before it.
    """
    return ("\u200b" if text.startswith("_") else "") + text.replace("$", r"\$")


def finish(axes: Axes, title: str, x_label: str) -> None:
    """What all panels of curves have in common."""
    axes.set_title(title, loc="left", size=11)
    axes.set_xlabel(x_label)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.8)
    axes.set_axisbelow(True)
