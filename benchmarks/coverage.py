"""`python -m benchmarks.coverage [python] [native]`: which lines the tests run, of the package and of csrc/cpu.

Prints the lines that no test runs, and writes benchmarks/results/<machine>-coverage.json. Why no test on this machine
runs them stands in `uncovered.py`; ends with status 1 where it does not.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from densenet_efficient.kernels import cpu

from . import parts
from . import results as results_file
from .results import ROOT
from .uncovered import MissedLines, count, unexplained

FOLDER = ROOT / "build" / "coverage"
PYTEST = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
TRACED = [sys.executable, "-m", "coverage", "run", *PYTEST[1:]]
NATIVE_TESTS = ("kernels", "native_layers", "inference", "inference_stem", "operators", "roofline", "concatenation")
# By capability. Where each line counts for itself, nothing is optimised: neither the rates of the machine are reached
# nor the accuracy of multiplications and additions in one.
BEST = ("-k", "not cpu_capability and not rates_of_the_machine and not means_far_from_zero")
OTHERS = ("-m", "each_capability")


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.coverage", description=__doc__)
    results_file.add_output(parser, "coverage")
    options, names = parts.parse(parser, PARTS, arguments)
    header = results_file.describe_machine()
    path = options.output or results_file.default_path(header, "coverage")
    FOLDER.mkdir(parents=True, exist_ok=True)
    for part in names:
        row = {"part": part, **PARTS[part]()}
        results = results_file.load(path, header)
        results_file.replace_row(results, row, "part", PARTS)
        results_file.save(path, results)
    rows = json.loads(path.read_text())["rows"]
    print(*lines(rows), f"wrote {path}", sep="\n")
    problems = [place for row in rows for place in unexplained(row["missed_lines"])]
    if problems:
        sys.exit("without a reason in benchmarks/uncovered.py:\n" + "\n".join(problems))


def python() -> dict[str, Any]:
    """Of the package's Python files, by the whole suite."""
    for earlier in FOLDER.glob("python*"):
        earlier.unlink()
    _run(*TRACED, "-m", "own_process")
    _run(*TRACED, "-m", "not own_process", "--numprocesses", "2")
    coverage, report = [sys.executable, "-m", "coverage"], FOLDER / "python.json"
    _run(*coverage, "combine", "--quiet")
    _run(*coverage, "report", "--show-missing", "--skip-covered")
    _run(*coverage, "json", "--quiet", "-o", str(report))
    return python_figures(json.loads(report.read_text()))


def python_figures(report: Mapping[str, Any]) -> dict[str, Any]:
    """Those of coverage's report in JSON."""
    missed: MissedLines = {}
    for name, file in report["files"].items():
        missed[name] = {function: sorted(part["missing_lines"]) for function, part in file["functions"].items()}
    return _figures(report["totals"]["num_statements"], missed)


def native() -> dict[str, Any]:
    """Of csrc/cpu, by the tests of the kernels; some of them once for each capability of this CPU."""
    _run(sys.executable, "tests/soak/instrumented.py", "coverage")
    for counts in FOLDER.rglob("*.gcda"):
        counts.unlink()
    tests = [f"tests/test_{name}.py" for name in NATIVE_TESTS]
    options = ["-n", "0", "-o", "pythonpath=build/coverage"]
    for capability in cpu.capabilities()[:-1]:
        _run(*PYTEST, *options, *OTHERS, *tests, DENSENET_EFFICIENT_CPU_CAPABILITY=capability, OMP_NUM_THREADS="4")
    _run(*PYTEST, *options, *BEST, *tests, OMP_NUM_THREADS="4")
    files = [file for counts in (FOLDER / "objects").rglob("*.gcda") for file in _files_of(counts)]
    return native_figures({"files": files})


def _files_of(counts: Path) -> Iterator[dict[str, Any]]:
    """Those of csrc/cpu in gcov's report of an object file. (gcovr loses the lines of a template's lambdas.)"""
    gcov = [os.environ.get("GCOV", "gcov"), "--json-format", "--stdout"]
    objects = ["--object-directory", str(counts.parent), str(counts)]
    report = json.loads(subprocess.run([*gcov, *objects], stdout=subprocess.PIPE, check=True).stdout)
    for file in report["files"]:
        path = Path(report["current_working_directory"], file["file"])
        if path.is_relative_to(ROOT / "csrc" / "cpu"):
            yield {"file": str(path.relative_to(ROOT)), "lines": file["lines"]}


def native_figures(report: Mapping[str, Any]) -> dict[str, Any]:
    """Those of gcov's reports, which list a line once for each of the functions that it is part of."""
    counts: dict[tuple[str, int], int] = {}
    for file in report["files"]:
        for line in file["lines"]:
            place = file["file"], line["line_number"]
            counts[place] = counts.get(place, 0) + line["count"]
    missed: MissedLines = {}
    for (name, number), runs in sorted(counts.items()):
        if runs == 0:
            missed.setdefault(name, {}).setdefault("", []).append(number)
    return _figures(len(counts), missed)


def _figures(total: int, missed: MissedLines) -> dict[str, Any]:
    kept = {
        name: {function: numbers for function, numbers in functions.items() if numbers}
        for name, functions in sorted(missed.items())
        if any(functions.values())
    }
    return {"lines": total, "missed": count(kept), "missed_lines": kept}


PARTS = {"python": python, "native": native}
TITLES = {"python": "the package's Python", "native": "`csrc/cpu`"}


def lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The figures in Markdown."""
    return [
        f"- the tests run {1 - row['missed'] / row['lines']:.1%} of the {row['lines']:,} lines of {TITLES[row['part']]}"
        for row in rows
    ]


def _run(*command: str, **environment: str) -> None:
    subprocess.run(command, cwd=ROOT, env=os.environ | environment, check=True)


if __name__ == "__main__":
    main(sys.argv[1:])
