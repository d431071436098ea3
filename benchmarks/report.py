"""`python -m benchmarks.report`: the README's benchmark sections, and the pictures, from the results files.

A section replaces what stands between `<!-- benchmarks:begin NAME -->` and `<!-- benchmarks:end -->`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .picture import draw, picture_path
from .results import RESULTS, ROOT, write_atomically

SECTION = re.compile(r"(<!-- benchmarks:begin (\S+) -->\n).*?(<!-- benchmarks:end -->)", re.DOTALL)
WORKLOAD = ("model", "dtype", "batch", "size")
COLUMNS = (
    "implementation",
    "layout",
    "step",
    "of torchvision",
    "forward",
    "images/s",
    "MiB per image",
    "less",
)
Row = dict[str, Any]
Results = dict[str, Any]


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the README is out of date")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results files")
    options = parser.parse_args(arguments)
    all_results = [json.loads(path.read_text()) for path in sorted(options.results.glob("*.json"))]
    before = options.readme.read_text()
    after = fill(before, all_results)
    if options.check:
        if after != before:
            sys.exit(f"{options.readme} does not match the results files; run: python -m benchmarks.report")
        return
    for results in all_results:
        draw(results, options.results / picture_path(results).name)
    write_atomically(options.readme, after)


def fill(readme: str, all_results: Sequence[Results]) -> str:
    """The README with every section generated anew. Raises ValueError for a section it does not know."""

    def section(match: re.Match[str]) -> str:
        begin, name, end = match.groups()
        if name not in SECTIONS:
            raise ValueError(f"unknown benchmarks section {name!r}; expected one of {', '.join(SECTIONS)}")
        device, task = SECTIONS[name]
        texts = [tables(results, task) for results in all_results if _runs_on(device, results)]
        return f"{begin}{chr(10).join(filter(None, texts)) or f'Not measured yet on a {device}.'}\n{end}"

    if readme.count("<!-- benchmarks:begin") != len(SECTION.findall(readme)):
        raise ValueError("a benchmarks section of the README lacks its name or its <!-- benchmarks:end -->")
    return SECTION.sub(section, readme)


def tables(results: Results, task: str) -> str:
    """One machine's tables of a task, one per workload, under a line that says what was measured where."""
    rows = [row for row in results["rows"] if row["task"] == task]
    if not rows:
        return ""
    lines = [figures_line(results), ""]
    if task == "train":
        lines += [f"![step time against memory]({picture_path(results).as_posix()})", ""]
    for _, workload in itertools.groupby(sorted(rows, key=_workload), key=_workload):
        lines += table(list(workload))
    if task == "train" and results.get("largest_batch"):
        lines += [largest_batches(results["largest_batch"]), ""]
    return "\n".join(lines)


def figures_line(results: Results) -> str:
    """Machine, versions, commit and date, and the time to the first step."""
    header, first_steps = results["header"], results["first_step"]
    versions = ", ".join(f"{name} {version}" for name, version in header["versions"].items())
    device = "" if header["device"] == "cpu" else f"{header['device']}, driver {header['driver']}, "
    machine = f"{device}{header['cpu']}, {header['cores']} cores, {header['instructions']}"
    line = f"{machine}; {versions}; commit {header['commit']}, {header['date']}."
    if first_steps:
        seconds = ", ".join(f"{row['implementation']} {row['seconds']:.1f} s" for row in first_steps)
        line += f" From starting Python to the end of {first_steps[0]['model']}'s first training step: {seconds}."
    return line


def table(rows: Sequence[Row]) -> list[str]:
    """One workload in Markdown: time against the fastest torchvision variant, memory against plain."""
    torchvision = [row for row in rows if row["implementation"].startswith("torchvision")]
    plain = [row for row in torchvision if row["implementation"] == "torchvision"]
    fastest = min((row["step_ms"] for row in torchvision if row["step_ms"]), default=None)
    smallest_plain = min((row["mib_per_image"] for row in plain if row["mib_per_image"]), default=None)
    first = rows[0]
    title = f"**{first['model']}, {first['dtype']}, batch {first['batch']}, {first['size']}x{first['size']}**"
    lines = [title, "", "| " + " | ".join(COLUMNS) + " |", "|---|---|" + "---:|" * (len(COLUMNS) - 2)]
    for row in rows:
        cells = [
            row["implementation"],
            row["layout"],
            _number(row["step_ms"], "{:.0f} ms"),
            _number(_ratio(row["step_ms"], fastest), "{:.2f}"),
            _number(row["forward_ms"], "{:.0f} ms"),
            _number(row["images_per_second"], "{:.1f}"),
            _number(row["mib_per_image"], "{:.1f}"),
            _number(_ratio(smallest_plain, row["mib_per_image"]), "{:.1f}x"),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


def largest_batches(rows: Sequence[Row]) -> str:
    """The largest batch of each implementation, of one model."""
    first = rows[0]
    batches = ", ".join(f"{row['implementation']} {row['batch']}" for row in rows)
    images = f"{first['size']}x{first['size']}"
    return f"The largest batch of {images} images whose {first['dtype']} step of {first['model']} fits: {batches}."


def _workload(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in WORKLOAD)


def _runs_on(device: str, results: Results) -> bool:
    return (device == "CPU") == (results["header"]["device"] == "cpu")


def _ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b else None


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


SECTIONS = {
    "training-cpu": ("CPU", "train"),
    "training-gpu": ("GPU", "train"),
    "inference-cpu": ("CPU", "infer"),
    "inference-gpu": ("GPU", "infer"),
}

if __name__ == "__main__":
    main(sys.argv[1:])
