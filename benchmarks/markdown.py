"""The pieces of the generated sections: the line that says what was measured where, tables, numbers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any


def figures_line(results: dict[str, Any]) -> str:
    """Machine, versions, commit and date, how often was timed, and the time to the first step."""
    header, first_steps = results["header"], results.get("first_step", [])
    versions = ", ".join(f"{name} {version}" for name, version in header["versions"].items())
    device = "" if header["device"] == "cpu" else f"{header['device']}, driver {header['driver']}, "
    machine = f"{device}{header['cpu']}, {header['cores']} cores, {header['instructions']}"
    line = f"{machine}; {versions}; commit {header['commit']}, {header['date']}."
    if "rounds" in results:
        line += f" Times are medians of {results['rounds']} rounds."
    if first_steps:
        seconds = ", ".join(f"{row['implementation']} {row['seconds']:.1f} s" for row in first_steps)
        line += f" From starting Python to the end of {first_steps[0]['model']}'s first training step: {seconds}."
    return line


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], words: int = 1) -> list[str]:
    """A table whose first ``words`` columns are words, the others numbers."""
    head = ["| " + " | ".join(columns) + " |", "|" + "---|" * words + "---:|" * (len(columns) - words)]
    return head + ["| " + " | ".join(cells) + " |" for cells in rows]


def number(value: float | None, form: str) -> str:
    """Formatted; empty if there is none."""
    return "" if value is None else form.format(value)


def ratio(a: float | None, b: float | None) -> float | None:
    """a / b where both are there."""
    return a / b if a is not None and b else None
