"""`python -m benchmarks.report`: the benchmark sections of the documents, and the pictures, from the results files.

A section replaces what stands between `<!-- benchmarks:begin NAME -->` and `<!-- benchmarks:end -->`.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from densenet_efficient.files import atomic_write

from . import blocking, coverage, headline, markdown, uncovered, workloads
from .conversion import table as conversion_table
from .evidence import pictures, sections
from .gpu_tiles_table import table as tiles_table
from .picture import draw, picture_path
from .planner import table as planner_table
from .results import RESULTS, ROOT
from .roofline import COLUMNS as ROOFLINE_COLUMNS
from .roofline import Line, Roofline, table_cells, title, without_small_lines
from .segmentation import table as segmentation_table
from .soak import lines as soak_lines
from .summary import summary
from .trainer_table import table as trainer_table
from .workloads import Results, Row

DOCUMENTS = [
    ROOT / name
    for name in (
        "README.md",
        "docs/performance.md",
        "docs/benchmarks.md",
        "docs/benchmarks_inference.md",
        "docs/training.md",
        "docs/planning.md",
        "docs/evidence.md",
        "docs/comparison.md",
        "docs/convert.md",
    )
]
SECTION = re.compile(r"(<!-- benchmarks:begin (\S+) -->\n).*?(<!-- benchmarks:end -->)", re.DOTALL)
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


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a document is out of date")
    parser.add_argument("--documents", type=Path, nargs="+", default=DOCUMENTS)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results files")
    parser.add_argument(
        "--pictures", type=Path, default=ROOT / "docs/pictures", help="folder of the documents' pictures"
    )
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
    options.pictures.mkdir(parents=True, exist_ok=True)
    for kind, draw_picture in pictures.PICTURES.items():
        for machine in special[kind]:
            draw_picture(machine, options.pictures / pictures.picture_name(machine, kind))
    headline.draw(results, options.pictures / headline.PICTURE)
    for document, text in filled.items():
        with atomic_write(document) as file:
            file.write(text.encode())


def fill(text: str, all_results: Sequence[Results], special: Mapping[str, Sequence[Results]] | None = None) -> str:
    """The document with every section generated anew; ``special`` are the results of other benchmarks, by kind.

    Raises ValueError for a section it does not know.
    """

    def section(match: re.Match[str]) -> str:
        begin, name, end = match.groups()
        if name not in SECTIONS:
            raise ValueError(f"unknown benchmarks section {name!r}; expected one of {', '.join(SECTIONS)}")
        if name == "blocking":
            return f"{begin}{blocking_table((special or {}).get('roofline', ()))}\n{end}"
        if name == "headline":
            return f"{begin}{headline.section(all_results)}\n{end}"
        device, task = SECTIONS[name]
        if task in SPECIAL:
            texts = [SPECIAL[task](results) for results in (special or {}).get(task, ()) if _runs_on(device, results)]
        else:
            write = summary if task == "summary" else functools.partial(tables, task=task)
            texts = [write(results) for results in all_results if _runs_on(device, results)]
        return f"{begin}{chr(10).join(filter(None, texts)) or f'Not measured yet on a {device}.'}\n{end}"

    if text.count("<!-- benchmarks:begin") != len(SECTION.findall(text)):
        raise ValueError("a benchmarks section lacks its name or its <!-- benchmarks:end -->")
    return SECTION.sub(section, text)


def roofline_tables(results: Results) -> str:
    """Where each step's time goes, by operation and size of images, under what the machine can do."""
    lines = [markdown.figures_line(results), ""]
    for row in results["rows"]:
        roofline = Roofline(**row | {"lines": [Line(**line) for line in row["lines"]]})
        lines += [f"**{title(roofline)}**", ""]
        lines += [
            f"Roof {roofline.product_rate / 1e9:.0f} GFLOP/s, copy rate {roofline.copy_rate / 1e9:.0f} GB/s.",
            "",
            *markdown.table(ROOFLINE_COLUMNS, table_cells(without_small_lines(roofline))),
            "",
        ]
    return "\n".join(lines)


def blocking_table(rooflines: Sequence[Results]) -> str:
    """What blocking would save, computed, and the most that it could gain in each step that a roofline has timed."""
    lines = [*markdown.table(blocking.COLUMNS, blocking.cells(), words=2), ""]
    for results in rooflines:
        gains = [
            "{} {} {:.1%} ({:.1%})".format(
                *_step(row)[:2], *(blocking.share_of_time(*_step(row), cache) for cache in (blocking.CPU_CACHE, 0))
            )
            for row in results["rows"]
            if row["model"] in blocking.LAYERS and row["size"] == 224
        ]
        lines += [
            f"{results['header']['cpu']}: the saved bytes at its copy rate, as a share of a step's measured time, "
            f"with that cache (and with none): {', '.join(gains)}.",
            "",
        ]
    return "\n".join(lines)


def _step(row: Row) -> tuple[str, str, int, float, float]:
    return row["model"], row["dtype"], row["batch"], row["step_seconds"], row["copy_rate"]


def soak_list(results: Results) -> str:
    """What the last full run of the reliability suite survived."""
    (figures,) = results["rows"]
    return "\n".join(
        [f"{markdown.figures_line(results)} {figures['minutes']:.0f} minutes.", "", *soak_lines(figures), ""]
    )


def under_figures_line(table: Callable[[Sequence[Row]], Sequence[str]]) -> Callable[[Results], str]:
    """Writes the lines that ``table`` makes of the rows, under what was measured where."""
    return lambda results: "\n".join([markdown.figures_line(results), "", *table(results["rows"]), ""])


def frontier_tables(results: Results) -> str:
    """Time against memory of every way to save it."""
    return "\n".join([sections.picture(results, "frontier", "step time against memory"), "", tables(results, "train")])


def tiles_tables(results: Results) -> str:
    """What the kernels of the convolutions take on a card, beside bare products."""
    copies = f"A copy moves {results['copy_gigabytes_per_second']:.0f} GB/s, read and written."
    return "\n".join([f"{markdown.figures_line(results)} {copies}", "", *tiles_table(results), ""])


def tables(results: Results, task: str) -> str:
    """One machine's tables of a task, one per workload, under a line that says what was measured where."""
    groups = workloads.of_task(results, task)
    if not groups:
        return ""
    return "\n".join([markdown.figures_line(results), "", *itertools.chain.from_iterable(map(table, groups))])


def table(rows: Sequence[Row]) -> list[str]:
    """One workload in Markdown: time against the fastest torchvision variant, memory against plain."""
    torchvision = workloads.best_of_torchvision(rows)
    all_cells = []
    for row in rows:
        cells = [
            row["implementation"],
            row["layout"],
            markdown.number(row["step_ms"], "{:.0f} ms"),
            markdown.number(markdown.ratio(row["step_ms"], torchvision["step_ms"]), "{:.2f}"),
            markdown.number(row["forward_ms"], "{:.0f} ms"),
            markdown.number(row["images_per_second"], "{:.1f}"),
            markdown.number(row["mib_per_image"], "{:.1f}"),
            markdown.number(markdown.ratio(torchvision["mib_per_image"], row["mib_per_image"]), "{:.1f}x"),
        ]
        all_cells.append(cells)
    return [f"**{workloads.title(rows[0])}**", "", *markdown.table(COLUMNS, all_cells, words=2), ""]


def _runs_on(device: str, results: Results) -> bool:
    return (device == "CPU") == (results["header"]["device"] == "cpu")


SECTIONS = {
    "headline": ("any machine", "train"),
    "summary-cpu": ("CPU", "summary"),
    "summary-gpu": ("GPU", "summary"),
    "training-cpu": ("CPU", "train"),
    "training-gpu": ("GPU", "train"),
    "inference-cpu": ("CPU", "infer"),
    "inference-gpu": ("GPU", "infer"),
    "roofline-cpu": ("CPU", "roofline"),
    "segmentation-cpu": ("CPU", "segmentation"),
    "conversion-cpu": ("CPU", "conversion"),
    "blocking": ("CPU", "computed"),  # not measured on a machine
    "trainer-cpu": ("CPU", "training"),
    "scaling-cpu": ("CPU", "scaling"),
    "timeline-cpu": ("CPU", "timeline"),
    "frontier-cpu": ("CPU", "frontier"),
    "largest-image-cpu": ("CPU", "largest-image"),
    "comparison-cpu": ("CPU", "comparison"),
    "planner-cpu": ("CPU", "planner"),
    "tiles-gpu": ("GPU", "tiles"),
    "soak-cpu": ("CPU", "soak"),
    "coverage-cpu": ("CPU", "coverage"),
}
SPECIAL = {  # by the end of their files' names
    "roofline": roofline_tables,
    "segmentation": under_figures_line(segmentation_table),
    "conversion": under_figures_line(conversion_table),
    "training": under_figures_line(trainer_table),
    "frontier": frontier_tables,
    "scaling": sections.scaling,
    "timeline": sections.timeline,
    "largest-image": sections.largest_image,
    "comparison": sections.comparison,
    "planner": under_figures_line(planner_table),
    "tiles": tiles_tables,
    "soak": soak_list,
    "coverage": under_figures_line(lambda rows: [*coverage.lines(rows), "", *uncovered.table(rows)]),
}

if __name__ == "__main__":
    main(sys.argv[1:])
