"""The picture of a machine: step time against memory per image, one panel per training workload."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from densenet_efficient.files import atomic_write

from .cells import GRAPH
from .workloads import workload_of

# The palette of Okabe and Ito, told apart with every kind of colour vision; the marks differ as well.
MARKS = {
    "naive": ("#000000", "X"),
    "torchvision": ("#E69F00", "o"),
    "torchvision-checkpoint": ("#56B4E9", "s"),
    "torchvision-graph": ("#F0E442", "h"),
    "block-checkpoint": ("#56B4E9", "p"),
    "selective-checkpoint": ("#56B4E9", "*"),
    "compile": ("#CC79A7", "^"),
    "compile-budget-0.5": ("#D55E00", "v"),
    "compile-budget-0.0": ("#D55E00", "<"),
    "ours-none": ("#009E73", "D"),
    "ours-bottleneck": ("#0072B2", "P"),
    "compile-max-autotune": ("#CC79A7", ">"),
    # captured in a CUDA graph
    "ours-none-graph": ("#009E73", "d"),
    "ours-bottleneck-graph": ("#0072B2", "8"),
}


def picture_path(results: dict[str, Any]) -> Path:
    """Where the README finds the picture of these results."""
    return Path("benchmarks", "results", f"{results['header']['machine']}.png")


def panels_of(results: dict[str, Any]) -> dict[tuple[str, str, int, int], list[dict[str, Any]]]:
    """The training rows that have both a time and a memory, by (model, dtype, batch, size).

    A step in a CUDA graph takes the memory of the one that launches its kernels.
    """
    training = [row for row in results["rows"] if row["task"] == "train"]
    memories = {(workload_of(row), row["implementation"], row["layout"]): row["mib_per_image"] for row in training}
    panels: dict[tuple[str, str, int, int], list[dict[str, Any]]] = {}
    for row in training:
        launched = row["implementation"].removesuffix(GRAPH)
        memory = memories.get((workload_of(row), launched, row["layout"]))
        if row["step_ms"] and memory:
            panels.setdefault(workload_of(row), []).append(row | {"mib_per_image": memory})
    return panels


def draw(results: dict[str, Any], path: Path) -> None:
    """Draw `panels_of` the results into `path`; nothing if there are none."""
    panels = panels_of(results)
    if not panels:
        return
    columns = min(len(panels), 2)
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(5.2 * columns, 3.6 * lines + 0.6), layout="constrained")
    axes = list(figure.subplots(lines, columns, sharex=True, squeeze=False).flat)
    for panel, ((model, dtype, batch, size), rows) in zip(axes, sorted(panels.items()), strict=False):
        _draw_panel(panel, f"{model}, {dtype}, batch {batch}, {size}x{size}", rows)
    marks = {label: mark for panel in axes for mark, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    # two names fit below a panel
    figure.legend(marks.values(), marks.keys(), loc="outside lower center", ncols=2 * columns, frameon=False)
    with atomic_write(path) as file:
        figure.savefig(file, dpi=120, format="png")


def _draw_panel(panel: Any, title: str, rows: list[dict[str, Any]]) -> None:
    for row in rows:
        colour, marker = MARKS[row["implementation"]]
        label = row["implementation"] + (", contiguous" if row["layout"] == "contiguous" else "")
        face = "none" if row["layout"] == "contiguous" else colour
        style = {"color": colour, "markerfacecolor": face, "markersize": 9, "linestyle": "none"}
        panel.plot(row["mib_per_image"], row["step_ms"], marker=marker, label=label, **style)
    frontier = _frontier([(row["mib_per_image"], row["step_ms"]) for row in rows])
    panel.step(*zip(*frontier, strict=True), where="post", color="0.6", linewidth=1, zorder=0)
    panel.set(title=title, xscale="log", xlabel="MiB per image", ylabel="step, ms")
    panel.xaxis.set_major_formatter("{x:.0f}")
    panel.margins(0.15)
    panel.set_ylim(bottom=0)
    panel.grid(alpha=0.3)


def _frontier(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other beats in both, by rising memory."""
    best: list[tuple[float, float]] = []
    for memory, time in sorted(points):
        if not best or time < best[-1][1]:
            best.append((memory, time))
    return best
