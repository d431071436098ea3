"""The table of a summary."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from .models import create_model
from .planning.sizes import format_bytes, format_count
from .summary import Costs, SummaryRow, format_shape, summarize, total_costs

TABLE_WIDTH = 120  # columns; in fewer, rich would cut digits and units off
NOTE = 'A step at "bottleneck" also saves the bottlenecks that raise no peak (docs/planning.md), which are not counted.'


def print_summary(
    model_name: str,
    input_shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
    console: Console | None = None,
) -> None:
    """Print the table of a preset, built on the meta device.

    Raises:
        ValueError: the name is unknown, or `input_shape` does not fit the model (see `summarize`).
    """
    with torch.device("meta"):
        model = create_model(model_name)
    rows = summarize(model, input_shape, dtype)
    title = f"{model_name}, input {format_shape(input_shape)}, {str(dtype).removeprefix('torch.')}"
    console = console or Console()
    console.width = max(console.width, TABLE_WIDTH)
    console.print(_table(title, rows, batch=input_shape[0]))
    console.print(NOTE)


def _table(title: str, rows: Sequence[SummaryRow], batch: int) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column("Layer", no_wrap=True)
    for header in ("Input\nchannels", "Bottle-\nneck", "Growth\nrate", "Output\nshape", "Parameters"):
        table.add_column(header, justify="right", no_wrap=True)
    for header in ("Multiply-\nadds", "Saved by\nnaive", "Saved by\nnone", "Saved by\nbottleneck"):
        table.add_column(header, justify="right", no_wrap=True)
    for row in rows:
        channels = (row.in_channels, row.bottleneck_channels or "", row.growth_rate or "")
        table.add_row(
            f"  {row.name.partition('.')[2]}" if row.is_layer else row.name,
            *map(str, channels),
            format_shape(row.output_shape),
            *_format_costs(row.costs),
            style="" if row.is_layer else "bold",
        )
    _add_totals(table, total_costs(rows), batch)
    return table


def _add_totals(table: Table, total: Costs, batch: int) -> None:
    table.add_section()
    blanks = [""] * 4
    table.add_row("total", *blanks, *_format_costs(total), style="bold")
    saved = (total.saved_naive, total.saved_none, total.saved_bottleneck)
    per_image = [format_bytes(value / batch) for value in saved]
    table.add_row("per image", *blanks, "", format_count(total.multiply_adds / batch), *per_image)
    ratios = [f"{total.saved_naive / value:.1f}x" for value in saved]
    table.add_row("naive / this", *blanks, "", "", *ratios)


def _format_costs(costs: Costs) -> list[str]:
    saved = (costs.saved_naive, costs.saved_none, costs.saved_bottleneck)
    return [f"{costs.parameters:,}", format_count(costs.multiply_adds), *map(format_bytes, saved)]
