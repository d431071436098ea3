"""The pieces of the generated sections: the line that says what was measured where, tables, numbers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

FIGURES = {"step_ms": "times", "mib_per_image": "memory"}
TASKS = {"train": "training", "infer": "inference"}


def figures_line(results: dict[str, Any]) -> str:
    """Machine, versions, commit and date, how often was timed, and the time to the first step."""
    header, first_steps = results["header"], results.get("first_step", [])
    versions = ", ".join(f"{name} {version}" for name, version in header["versions"].items())
    device = "" if header["device"] == "cpu" else f"{header['device']}, driver {header['driver']}, "
    line = f"{device}{processor(header)}; {versions}; commit {header['commit']}, {header['date']}."
    if "rounds" in results:
        line += f" Times are medians of {results['rounds']} rounds."
    if first_steps:
        seconds = ", ".join(f"{row['implementation']} {row['seconds']:.1f} s" for row in first_steps)
        line += f" From starting Python to the end of {first_steps[0]['model']}'s first training step: {seconds}."
    return line + "".join(f" {sentence}" for sentence in _earlier(results))


def machine(header: dict[str, Any]) -> str:
    """What the figures are of: a GPU, or a CPU."""
    return processor(header) if header["device"] == "cpu" else header["device"]


def processor(header: dict[str, Any]) -> str:
    """The CPU and what of it was used."""
    return f"{header['cpu']}, {header['cores']} cores, {header['instructions']}"


def _earlier(results: dict[str, Any]) -> Iterator[str]:
    """A sentence for each other commit: what it has measured."""
    batches: dict[tuple[str, str, str], dict[int, None]] = {}
    for row in results["rows"]:
        commits = row.get("commits", {})
        for figure in FIGURES.keys() & commits.keys():
            place = f"{TASKS[row['task']]} {FIGURES[figure]}", f"{row['model']}, {row['dtype']}"
            batches.setdefault((commits[figure], *place), {})[row["batch"]] = None
    measured: dict[str, dict[str, None]] = {}
    for (commit, figure, network), sizes in sorted(batches.items()):
        measured.setdefault(commit, {})[f"{figure} of {network}, batch {' and '.join(map(str, sizes))}"] = None
    others = [(row, _name(row)) for row in results["rows"]]
    others += [(row, "the first step") for row in results.get("first_step", [])[:1]]
    for row, name in others:
        if name is not None and "commit" in row:
            measured.setdefault(row["commit"], {})[name] = None
    for commit, places in measured.items():
        yield f"Of earlier code, commit {commit}: {'; '.join(places)}."


def _name(row: dict[str, Any]) -> str | None:
    """What a row is of that is all of one run; None where its figures tell."""
    if {"task", "predicted"} <= row.keys():
        return f"{TASKS[row['task']]} memory of {row['model']}"
    return row.get("name", row.get("part"))


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
