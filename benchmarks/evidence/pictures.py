"""The pictures of docs/evidence.md, from the results of each part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from densenet_efficient.files import save_figure
from densenet_efficient.training.pictures import finish

from ..picture import MARKS, draw

Results = dict[str, Any]
LABELS = {
    "naive": "naive",
    "torchvision": "torchvision",
    "torchvision-checkpoint": "torchvision, memory_efficient",
    "ours-none": 'ours, "none"',
    "ours-bottleneck": 'ours, "bottleneck"',
}
PANELS = {
    "depth": ("MiB per image against depth", "depth\nDenseNet-BC, growth rate 12, 32x32 images"),
    "size": ("MiB per image against its size", "height and width, pixels\nDenseNet-201"),
    "batch": ("Peak of the process against batch, MiB", "images\nDenseNet-201, 224x224 images"),
}


def picture_name(results: Results, kind: str) -> str:
    """The file of a part's picture."""
    return f"{results['header']['machine']}-{kind}.png"


def draw_scaling(results: Results, path: Path) -> None:
    """Three panels side by side: memory against depth, image size and batch."""
    figure = Figure(figsize=(13, 4.6), layout="constrained")
    lines: dict[str, Any] = {}
    for axes, (against, (title, x_label)) in zip(figure.subplots(1, len(PANELS)), PANELS.items(), strict=True):
        rows = [row for row in results["rows"] if row["against"] == against]
        for name in dict.fromkeys(row["implementation"] for row in rows):
            points = sorted((row["value"], row["mib"]) for row in rows if row["implementation"] == name)
            colour, marker = MARKS[name]
            style = {"color": colour, "marker": marker, "markersize": 6, "linewidth": 1.8}
            [lines[LABELS[name]]] = axes.plot(*zip(*points, strict=True), **style)
        finish(axes, title, x_label)
        axes.set_xticks(sorted({row["value"] for row in rows}))
        axes.set_ylim(bottom=0)
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=len(lines), frameon=False)
    save_figure(figure, path)


def draw_timeline(results: Results, path: Path) -> None:
    """One panel an implementation, one above the other, all on the same axes."""
    rows = results["rows"]
    figure = Figure(figsize=(9, 1.9 * len(rows) + 0.6), layout="constrained")
    all_axes = list(figure.subplots(len(rows), 1, sharex=True, sharey=True, squeeze=False).flat)
    for axes, row in zip(all_axes, rows, strict=True):
        colour, _ = MARKS[row["implementation"]]
        moments, mib = zip(*row["timeline"], strict=True)
        axes.fill_between(moments, mib, step="post", color=colour, alpha=0.35, linewidth=0)
        axes.plot(moments, mib, color=colour, linewidth=1.4, drawstyle="steps-post")
        for phase in ("forward", "backward"):
            axes.axvline(row["phases_ms"][phase], color="0.4", linestyle=":", linewidth=1)
        forward, backward = row["phases_ms"]["forward"], row["phases_ms"]["backward"]
        for phase, moment in (("forward", forward / 2), ("backward", (forward + backward) / 2)):
            axes.annotate(phase, (moment, 0.93), xycoords=("data", "axes fraction"), ha="center", va="top", size=8)
        finish(axes, f"{LABELS[row['implementation']]}: at most {row['peak_mib']:.0f} MiB", "")
        axes.set_ylabel("MiB")
    first = rows[0]
    workload = f"{first['model']}, batch {first['batch']}, {first['size']}x{first['size']}, {first['dtype']}"
    all_axes[-1].set_xlabel(f"milliseconds of one training step ({workload})")
    all_axes[-1].set_ylim(0, 1.15 * max(row["peak_mib"] for row in rows))
    all_axes[-1].set_xlim(left=0)
    save_figure(figure, path)


def draw_largest_image(results: Results, path: Path) -> None:
    """The images as squares to scale, one in the other."""
    rows = sorted(results["rows"], key=lambda row: row["largest"], reverse=True)
    side = rows[0]["largest"]
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    for row in rows:
        colour, _ = MARKS[row["implementation"]]
        square = Rectangle((0, 0), row["largest"], row["largest"], facecolor=colour, alpha=0.35)
        axes.add_patch(square)
        axes.add_patch(Rectangle((0, 0), row["largest"], row["largest"], fill=False, edgecolor=colour, linewidth=2))
        text = f"{LABELS[row['implementation']]}: {row['largest']}x{row['largest']}"
        axes.annotate(text, (side * 1.04, row["largest"]), va="top", size=10, annotation_clip=False)
        axes.plot([row["largest"], side * 1.03], [row["largest"]] * 2, color=colour, linewidth=1, clip_on=False)
    axes.set(xlim=(-side * 0.01, side * 1.6), ylim=(-side * 0.01, side * 1.02), aspect="equal")
    axes.set_axis_off()
    save_figure(figure, path)


PICTURES = {
    "scaling": draw_scaling,
    "timeline": draw_timeline,
    "frontier": draw,
    "largest-image": draw_largest_image,
}
