"""`python docs/scripts/figures.py`: draw the figures of docs/mathematics.md into docs/pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

PICTURES = Path(__file__).resolve().parent.parent / "pictures"
# The palette of Okabe and Ito: the block's input, then what each layer adds.
COLOURS = ("#999999", "#E69F00", "#56B4E9", "#009E73", "#CC79A7")
WIDTHS = (3.0, 1.0, 1.0, 1.0, 1.0)  # C0 channels, then k for each layer
NAMES = ("$x_0$", "$x_1$", "$x_2$", "$x_3$", "$x_4$")
HEIGHT = 0.7
LAYERS = len(WIDTHS) - 1


def main() -> None:
    matplotlib.rcParams["svg.hashsalt"] = "densenet_efficient"  # else its identifiers are new each time
    for name, draw in FIGURES.items():
        figure = draw()
        figure.savefig(PICTURES / f"{name}.svg", metadata={"Date": None})


def shared_storage() -> Figure:
    """The naive network's concatenations beside one storage."""
    figure, (naive, ours) = _panels(
        ("torch.cat: each layer's input is a copy", "one storage: each input is a prefix"), -3.7
    )
    for layer in range(LAYERS):
        _features(naive, 0, -layer * 1.1, range(layer + 1))
        _say(naive, -0.25, -layer * 1.1 + HEIGHT / 2, f"layer {layer + 1} reads", ha="right")
    _features(ours, 0, 0, range(LAYERS + 1))
    for layer in range(LAYERS):
        low = -0.55 - layer * 0.75
        _span(ours, 0, sum(WIDTHS[: layer + 1]), low, "0.25", "<->")
        start = sum(WIDTHS[: layer + 1])
        _span(ours, start, start + WIDTHS[layer + 1], low, COLOURS[layer + 1], "-", linewidth=5)
        _say(ours, -0.25, low, f"layer {layer + 1}", ha="right")
    _say(ours, 3.5, -3.45, "arrow: what it reads; bar: the slot that it writes", ha="center")
    return figure


def shared_statistics() -> Figure:
    """Which mean and variance each layer takes, and which it is given."""
    figure, (naive, ours) = _panels(("naive: taken anew by each layer", "ours: taken once, when written"), -4.3)
    for axes, again in ((naive, True), (ours, False)):
        for layer in range(LAYERS + 1):
            start = 0.0
            for piece in range(layer + 1):
                taken = again or piece == layer
                _box(axes, start, -layer * 0.85, WIDTHS[piece], COLOURS[piece] if taken else "white", COLOURS[piece])
                start += WIDTHS[piece]
            _say(
                axes, -0.25, -layer * 0.85 + HEIGHT / 2, f"layer {layer + 1}" if layer < LAYERS else "exit", ha="right"
            )
    _say(naive, 3.5, -4.1, "filled: a pass over the channels for their statistics", ha="center")
    _say(ours, 3.5, -4.1, "outlined: only gamma and beta are the layer's own", ha="center")
    return figure


def deferred_projection() -> Figure:
    """The backward of a block: additions into one buffer, each slot corrected once."""
    figure = Figure(figsize=(9.6, 4.3), layout="constrained")
    axes = figure.subplots()
    _blank(axes, (-3.4, 9.4), (-4.5, 1.3))
    _features(axes, 0, 0.4, range(LAYERS + 1))
    _say(axes, -0.25, 0.4 + HEIGHT / 2, "gradient buffer", ha="right")
    for row, layer in enumerate(reversed(range(1, LAYERS + 1))):
        low = -0.5 - row * 1.05
        start = sum(WIDTHS[:layer])
        _box(axes, start, low - HEIGHT, WIDTHS[layer], COLOURS[layer], "black")
        _say(axes, start + WIDTHS[layer] + 0.15, low - HEIGHT / 2, "projected once, then read", ha="left")
        _span(axes, 0, start - 0.05, low - HEIGHT / 2, "0.25", "<-")
        _say(axes, start / 2, low - HEIGHT / 2 + 0.08, "adds scale * masked gradient", ha="center", va="bottom")
        _say(axes, -0.25, low - HEIGHT / 2, f"layer {layer}", ha="right")
    return figure


def one_layer() -> Figure:
    """What of one layer is kept for the backward, by each implementation."""
    figure = Figure(figsize=(9.6, 3.4), layout="constrained")
    axes = figure.subplots()
    _blank(axes, (-2.9, 11.8), (-3.0, 1.6))
    steps = ("input", "normalised", "ReLU", "bottleneck", "normalised", "ReLU", "output")
    operations = ("", "BN", "ReLU", "conv 1x1", "BN", "ReLU", "conv 3x3")
    kept = {
        "naive": ("kept", "in place", "kept", "kept", "in place", "kept", "copied"),
        'ours, "none"': ("storage", "tile", "tile", "kept", "tile", "tile", "storage"),
        'ours, "bottleneck"': ("storage", "tile", "tile", "recomputed", "tile", "tile", "storage"),
    }
    for column, (step, operation) in enumerate(zip(steps, operations, strict=True)):
        _say(axes, column * 1.7 + 0.65, 1.35, operation, ha="center", color="0.35")
        _say(axes, column * 1.7 + 0.65, 0.95, step, ha="center")
    for row, (name, states) in enumerate(kept.items()):
        low = -row * 1.1
        _say(axes, -0.25, low + HEIGHT / 2, name, ha="right")
        for column, state in enumerate(states):
            face = {"kept": COLOURS[1], "storage": COLOURS[2]}.get(state, "white")
            _box(axes, column * 1.7, low, 1.3, face, "0.75" if face == "white" else "black")
            _say(axes, column * 1.7 + 0.65, low + HEIGHT / 2, state, ha="center")
    explanation = "tile: exists a few rows at a time, in the cache; storage: a slice of the block's one"
    _say(axes, 5.1, -2.8, explanation, ha="center")
    return figure


FIGURES: dict[str, Callable[[], Figure]] = {
    "shared-storage": shared_storage,
    "shared-statistics": shared_statistics,
    "deferred-projection": deferred_projection,
    "one-layer": one_layer,
}


def _panels(titles: Sequence[str], bottom: float) -> tuple[Figure, Sequence[Axes]]:
    figure = Figure(figsize=(9.6, 0.8 * (1.1 - bottom)), layout="constrained")
    panels = figure.subplots(1, len(titles))
    for axes, title in zip(panels, titles, strict=True):
        _blank(axes, (-1.9, 7.2), (bottom, 0.9))
        axes.set_title(title, size=11)
    return figure, panels


def _blank(axes: Axes, x_limits: tuple[float, float], y_limits: tuple[float, float]) -> None:
    axes.set(xlim=x_limits, ylim=y_limits)
    axes.set_axis_off()


def _features(axes: Axes, x: float, y: float, pieces: Sequence[int]) -> None:
    """Feature maps side by side, from ``x`` on."""
    for piece in pieces:
        _box(axes, x, y, WIDTHS[piece], COLOURS[piece], "black")
        _say(axes, x + WIDTHS[piece] / 2, y + HEIGHT / 2, NAMES[piece], ha="center")
        x += WIDTHS[piece]


def _box(axes: Axes, x: float, y: float, width: float, face: str, edge: str) -> None:
    axes.add_patch(Rectangle((x, y), width, HEIGHT, facecolor=face, edgecolor=edge, linewidth=1.2))


def _say(axes: Axes, x: float, y: float, text: str, ha: str, va: str = "center", color: str = "black") -> None:
    axes.text(x, y, text, ha=ha, va=va, size=9, color=color)


def _span(axes: Axes, start: float, stop: float, y: float, color: str, style: str, linewidth: float = 1.2) -> None:
    arrow = {"arrowstyle": style, "color": color, "linewidth": linewidth, "mutation_scale": 10}
    axes.add_patch(FancyArrowPatch((start, y), (stop, y), shrinkA=0, shrinkB=0, **arrow))


if __name__ == "__main__":
    main()
