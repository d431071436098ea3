"""`python -m benchmarks.report`: the benchmark sections of the documents, and the pictures, from the results files.

A section replaces what stands between `<!-- benchmarks:begin NAME -->` and `<!-- benchmarks:end -->`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .picture import draw, picture_path
from .results import RESULTS, ROOT, write_atomically
from .roofline import COLUMNS as ROOFLINE_COLUMNS
from .roofline import Line, Roofline, table_cells, title, without_small_lines
from .segmentation import table as segmentation_table

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
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a document is out of date")
    parser.add_argument("--documents", type=Path, nargs="+", default=[ROOT / "README.md", ROOT / "docs/performance.md"])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results files")
    options = parser.parse_args(arguments)
    paths = sorted(options.results.glob("*.json"))
    special = {
        kind: [json.loads(path.read_text()) for path in paths if path.stem.endswith(f"-{kind}")] for kind in SPECIAL
    }
    results = [json.loads(path.read_text()) for path in paths if not path.stem.endswith(tuple(SPECIAL))]
    texts = {document: document.read_text() for document in options.documents}
    filled = {document: fill(text, results, special) for document, text in texts.items()}
    if options.check:
        outdated = [str(document) for document in texts if filled[document] != texts[document]]
        if outdated:
            sys.exit(f"{', '.join(outdated)} does not match the results files; run: python -m benchmarks.report")
        return
    for machine in results:
        draw(machine, options.results / picture_path(machine).name)
    for document, text in filled.items():
        write_atomically(document, text)


def fill(text: str, all_results: Sequence[Results], special: Mapping[str, Sequence[Results]] | None = None) -> str:
    """The document with every section generated anew; ``special`` are the results of other benchmarks, by kind.

    Raises ValueError for a section it does not know.
    """

    def section(match: re.Match[str]) -> str:
        begin, name, end = match.groups()
        if name not in SECTIONS:
            raise ValueError(f"unknown benchmarks section {name!r}; expected one of {', '.join(SECTIONS)}")
        device, task = SECTIONS[name]
        if task in SPECIAL:
            texts = [SPECIAL[task](results) for results in (special or {}).get(task, ()) if _runs_on(device, results)]
        else:
            texts = [tables(results, task) for results in all_results if _runs_on(device, results)]
        return f"{begin}{chr(10).join(filter(None, texts)) or f'Not measured yet on a {device}.'}\n{end}"

    if text.count("<!-- benchmarks:begin") != len(SECTION.findall(text)):
        raise ValueError("a benchmarks section lacks its name or its <!-- benchmarks:end -->")
    return SECTION.sub(section, text)


def roofline_tables(results: Results) -> str:
    """Where each step's time goes, by operation and size of images, under what the machine can do."""
    lines = [figures_line(results), ""]
    for row in results["rows"]:
        roofline = Roofline(**row | {"lines": [Line(**line) for line in row["lines"]]})
        lines += [f"**{title(roofline)}**", ""]
        lines += [
            f"Roof {roofline.product_rate / 1e9:.0f} GFLOP/s, copy rate {roofline.copy_rate / 1e9:.0f} GB/s.",
            "",
            "| " + " | ".join(ROOFLINE_COLUMNS) + " |",
            "|---|" + "---:|" * (len(ROOFLINE_COLUMNS) - 1),
        ]
        lines += ["| " + " | ".join(cells) + " |" for cells in table_cells(without_small_lines(roofline))]
        lines.append("")
    return "\n".join(lines)


def segmentation_tables(results: Results) -> str:
    """The memory of FC-DenseNets."""
    return "\n".join([figures_line(results), "", *segmentation_table(results["rows"]), ""])


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
    header, first_steps = results["header"], results.get("first_step", [])
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
    "roofline-cpu": ("CPU", "roofline"),
    "segmentation-cpu": ("CPU", "segmentation"),
}
SPECIAL = {"roofline": roofline_tables, "segmentation": segmentation_tables}  # by the end of their files' names

if __name__ == "__main__":
    main(sys.argv[1:])
