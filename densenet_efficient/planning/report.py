"""The plan as a table."""

from __future__ import annotations

from dataclasses import astuple

from rich import box
from rich.console import Console
from rich.table import Table

from ..summary import format_shape
from ..summary_table import TABLE_WIDTH
from .planner import MemoryPlan
from .sizes import format_bytes
from .timeline import Memory

COLUMNS = ("Weights", "Gradients", "Optimizer\nstate", "Saved\nactivations", "Workspace", "Peak of\nall memory")


def print_plan(plan: MemoryPlan, console: Console | None = None) -> None:
    """Print the memory of each stage and of both peaks, and what fits the budget."""
    console = console or Console()
    console.width = max(console.width, TABLE_WIDTH)
    console.print(plan_table(plan))
    for line in conclusions(plan):
        console.print(line, highlight=False)


def plan_table(plan: MemoryPlan) -> Table:
    title = f"{plan.model}, input {format_shape(plan.input_shape)}, {plan.dtype}, {plan.optimizer}"
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column("", no_wrap=True)
    table.add_column("Check-\npointing", no_wrap=True)
    for header in COLUMNS:
        table.add_column(header, justify="right", no_wrap=True)
    for stage in plan.stages:
        table.add_row(stage.name, stage.checkpointing or "", *_cells(stage.own), format_bytes(stage.peak))
    table.add_section()
    for name, peak in (("training", plan.training), ("inference", plan.inference)):
        table.add_row(name, peak.moment, *_cells(peak.memory), format_bytes(peak.peak), style="bold")
    return table


def conclusions(plan: MemoryPlan) -> list[str]:
    """What the figures say, in sentences."""
    lines = [f"The backward recomputes {plan.recomputed:.1%} of a forward's multiply-adds."]
    if plan.budget is not None:
        verb = "fits" if plan.fits else "does not fit"
        batch, size = plan.largest_batch, plan.largest_size
        images = format_shape(plan.input_shape[1:])
        lines += [
            f"The training step {verb} into {format_bytes(plan.budget)}.",
            f"The largest batch of {images} images that fits: {batch or 'none'}.",
            f"The largest images that fit at batch {plan.input_shape[0]}: {f'{size}x{size}' if size else 'none'}.",
        ]
    if plan.on_host:
        stages = [stage.name for stage in plan.stages if stage.name.startswith("denseblock")]
        names = ", ".join(name for name, away in zip(stages, plan.offloaded, strict=True) if away)
        lines.append(f"In the host's pinned memory wait the storages of {names}: {format_bytes(plan.on_host)}.")
    return [*lines, "Counted are tensors; the interpreter, the libraries and a GPU's context come on top."]


def _cells(memory: Memory) -> list[str]:
    return list(map(format_bytes, astuple(memory)))
