"""A machine's figures in two tables: ours beside the fastest of torchvision and of everything else."""

from __future__ import annotations

from collections.abc import Sequence

from . import markdown, workloads
from .cells import GRAPH
from .picture import panels_of, picture_path
from .results import MEASURED
from .workloads import OURS, Results, Row

TRAINING_COLUMNS = (
    "torchvision",
    "none",
    "of it",
    "bottleneck",
    "of it",
    "MiB per image: torchvision",
    "none",
    "bottleneck",
)
INFERENCE_COLUMNS = ("torchvision", "fastest other", "ours", "of the fastest")


def summary(results: Results) -> str:
    """One machine in two tables that a click unfolds, a line per workload."""
    lines = [f"<details><summary>{markdown.machine(results['header'])}</summary>", ""]
    lines += [markdown.figures_line(results), ""]
    training, inference = (
        [part for rows in workloads.of_task(results, task) for part in workloads.by_launch(rows)]
        for task in ("train", "infer")
    )
    if panels_of(results):
        lines += [f"![step time against memory]({picture_path(results).as_posix()})", ""]
        if any(row["implementation"].endswith(GRAPH) for row in results["rows"]):
            lines += ["A CUDA graph stands at the memory of the same network when its kernels are launched.", ""]
    if training:
        lines += [*markdown.table(("training step", *TRAINING_COLUMNS), map(_training_cells, training)), ""]
    if inference:
        lines += [*markdown.table(("inference", *INFERENCE_COLUMNS), map(_inference_cells, inference)), ""]
    if results.get("largest_batch"):
        lines += [largest_batches(results["largest_batch"]), ""]
    lines += ["</details>", ""]
    return "\n".join(lines)


def _training_cells(rows: Sequence[Row]) -> list[str]:
    return [workloads.title(rows[0]), *comparison(rows)]


def comparison(rows: Sequence[Row]) -> list[str]:
    """The cells of TRAINING_COLUMNS."""
    fastest, smallest = workloads.best_of_torchvision(rows).values()
    ours = [next((row for row in rows if row["implementation"] == name), dict.fromkeys(MEASURED)) for name in OURS]
    cells = [markdown.number(fastest, "{:.0f} ms")]
    for row in ours:
        cells += [
            markdown.number(row["step_ms"], "{:.0f} ms"),
            markdown.number(markdown.ratio(row["step_ms"], fastest), "{:.2f}"),
        ]
    cells.append(markdown.number(smallest, "{:.1f}"))
    for row in ours:
        less = markdown.number(markdown.ratio(smallest, row["mib_per_image"]), " ({:.1f}x less)")
        cells.append(markdown.number(row["mib_per_image"], "{:.1f}") + less)
    return cells


def _inference_cells(rows: Sequence[Row]) -> list[str]:
    fastest = workloads.best_of_torchvision(rows)["step_ms"]
    timed = [row for row in rows if row["step_ms"]]
    ours = min((row["step_ms"] for row in timed if row["implementation"] in OURS), default=None)
    others = [row for row in timed if not row["implementation"].startswith(("ours", "torchvision"))]
    other = min(others, key=lambda row: row["step_ms"], default=None)
    peers = [time for time in (fastest, other and other["step_ms"]) if time]
    return [
        workloads.title(rows[0]),
        markdown.number(fastest, "{:.0f} ms"),
        f"{other['step_ms']:.0f} ms ({other['implementation']})" if other else "",
        markdown.number(ours, "{:.0f} ms"),
        markdown.number(markdown.ratio(ours, min(peers, default=None)), "{:.2f}"),
    ]


def largest_batches(rows: Sequence[Row]) -> str:
    """The largest batch of each implementation, of one model."""
    first = rows[0]
    batches = ", ".join(f"{row['implementation']} {row['batch']}" for row in rows)
    step = f"{first['dtype']} step of {first['model']}"
    missing = "" if any(row["implementation"] in OURS for row in rows) else " Ours was not measured."
    return f"The largest batch of {first['size']}x{first['size']} images whose {step} fits: {batches}.{missing}"
