"""What a reader sees first: one network's training step on every machine, in a table and in a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from densenet_efficient.files import save_figure
from densenet_efficient.training.pictures import finish

from . import markdown, workloads
from .evidence.pictures import LABELS
from .picture import MARKS, panels_of
from .summary import TRAINING_COLUMNS, comparison
from .workloads import Results, Row

MODEL = "densenet201"
PICTURE = "headline.png"
SHOWN = ("torchvision-checkpoint", *workloads.OURS)
FIGURES = {"step_ms": "time of a training step", "mib_per_image": "activation memory per image"}


def section(all_results: Sequence[Results]) -> str:
    """The picture and the table, a line per machine and workload with both a time and a memory."""
    lines = steps(all_results)
    if not lines:
        return f"{MODEL} was not measured yet."
    cells = ([name, *comparison(rows)] for name, rows in lines.items())
    picture = f"![time and memory of {MODEL}, as shares of torchvision's](docs/pictures/{PICTURE})"
    return "\n".join([picture, "", *markdown.table((MODEL, *TRAINING_COLUMNS), cells), ""])


def steps(all_results: Sequence[Results]) -> dict[str, list[Row]]:
    """The rows of each step by its name, where torchvision took one too; those of CPUs come first."""
    return {
        f"{markdown.machine(results['header'])}: {_workload(part[0])}": part
        for results in sorted(all_results, key=lambda results: results["header"]["device"] != "cpu")
        for (model, *_), rows in sorted(panels_of(results).items())
        if model == MODEL
        for part in workloads.by_launch(rows)
        if all(workloads.best_of_torchvision(part).values())
    }


def _workload(row: Row) -> str:
    return f"{row['dtype']}, batch {row['batch']}{row.get('launch', '')}"


def draw(all_results: Sequence[Results], path: Path) -> None:
    """A line per step: its time, and its memory, as shares of torchvision's; nothing where none was measured."""
    lines = steps(all_results)
    if not lines:
        return
    figure = Figure(figsize=(11, 0.36 * len(lines) + 1.5), layout="constrained")
    panels = figure.subplots(1, len(FIGURES), sharey=True)
    for panel, (measure, title) in zip(panels, FIGURES.items(), strict=True):
        _draw_panel(panel, measure, title, list(lines.values()))
    panels[0].set_yticks(range(len(lines)), lines)
    panels[0].invert_yaxis()
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    save_figure(figure, path)


def _draw_panel(panel: Axes, measure: str, title: str, lines: Sequence[Sequence[Row]]) -> None:
    panel.axvline(1, color=MARKS["torchvision"][0], label="torchvision")
    for name in SHOWN:
        shares = [
            (row[measure] / workloads.best_of_torchvision(rows)[measure], line)
            for line, rows in enumerate(lines)
            for row in rows
            if row["implementation"] == name and row["layout"] != "contiguous"
        ]
        if shares:
            colour, marker = MARKS[name]
            panel.plot(
                *zip(*shares, strict=True), color=colour, marker=marker, markersize=8, linestyle="none",
                label=LABELS[name],
            )  # fmt: skip
    finish(panel, title, "of torchvision's")
    panel.set_xlim(left=0)
    panel.xaxis.set_major_formatter("{x:.0%}")
