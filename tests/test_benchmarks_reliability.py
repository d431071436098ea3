"""The figures of the reliability suite and of coverage, as the README states them, and the parts to be measured."""

from __future__ import annotations

import argparse
import json
import re
import time
from pathlib import Path

import pytest
from test_benchmarks import HEADER

from benchmarks import coverage, parts, report, soak, uncovered
from benchmarks import results as results_file

SURVIVED = {"property_cases": 2000, "memory_growth": 0.0012, "minutes": 17.4}
FUNCTIONS = {"A.run": {"missing_lines": [7, 3]}, "": {"missing_lines": []}}
PYTHON = {"totals": {"num_statements": 40}, "files": {"a.py": {"functions": FUNCTIONS}, "b.py": {"functions": {}}}}
# A line of a template stands there once for each of its instances.
NATIVE_LINES = [(1, 5), (2, 0), (2, 3), (3, 0), (3, 0)]
NATIVE = {
    "files": [{"file": "a.cpp", "lines": [{"line_number": line, "count": count} for line, count in NATIVE_LINES]}]
}


def test_the_readme_states_the_figures(tmp_path: Path) -> None:
    rows = [
        {"part": "python", **coverage.python_figures(PYTHON)},
        {"part": "native", **coverage.native_figures(NATIVE)},
    ]
    results_file.save(tmp_path / "some-cpu-soak.json", {"header": HEADER, "rows": [SURVIVED]})
    results_file.save(tmp_path / "some-cpu-coverage.json", {"header": HEADER, "rows": rows})
    document = tmp_path / "README.md"
    document.write_text(
        "\n".join(f"<!-- benchmarks:begin {name}-cpu -->\n<!-- benchmarks:end -->" for name in ("soak", "coverage"))
    )
    report.main([f"--documents={document}", f"--results={tmp_path}", f"--pictures={tmp_path / 'pictures'}"])
    lines = document.read_text().splitlines()
    assert "- 2,000 random networks, images, layouts, dtypes and modes against the reference: no mismatch" in lines
    assert "- its memory grew by 0.12% from the first tenth to the end" in lines
    assert any(line.endswith(" 17 minutes.") for line in lines)
    assert "- the tests run 95.0% of the 40 lines of the package's Python" in lines
    assert "- the tests run 66.7% of the 3 lines of `csrc/cpu`" in lines
    assert "| `a.py::A.run` |  | 2 |" in lines


def test_the_lines_that_no_test_runs_are_kept() -> None:
    assert coverage.python_figures(PYTHON)["missed_lines"] == {"a.py": {"A.run": [3, 7]}}
    assert coverage.native_figures(NATIVE) == {"lines": 3, "missed": 1, "missed_lines": {"a.cpp": {"": [3]}}}


def test_the_counts_are_those_of_the_extensions_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose names the compiler gives from where it ran."""
    lines = [{"line_number": 3, "count": 2}]
    files = [{"file": name, "lines": lines} for name in ("cpu/vector.h", "operators.h", "/usr/include/math.h")]
    report = {"current_working_directory": str(results_file.ROOT / "csrc"), "files": files}
    gcov = tmp_path / "gcov"
    gcov.write_text(f"#!/bin/sh\ncat <<'END'\n{json.dumps(report)}\nEND\n")
    gcov.chmod(0o755)
    monkeypatch.setenv("GCOV", str(gcov))
    assert list(coverage._files_of(tmp_path / "vector.gcda")) == [{"file": "csrc/cpu/vector.h", "lines": lines}]


def test_a_line_that_no_test_runs_needs_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    missed = {"a.py": {"A.run": [3, 7], "f": [9]}, "b.py": {"": [1]}}
    monkeypatch.setattr(uncovered, "REASONS", {"a.py::f": "needs a GPU", "b.py": "is for other machines"})
    assert uncovered.unexplained(missed) == ["a.py::A.run: 3, 7"]


def test_every_line_that_no_test_ran_has_its_reason() -> None:
    for path in results_file.RESULTS.glob("*-coverage.json"):
        for row in json.loads(path.read_text())["rows"]:
            assert uncovered.unexplained(row["missed_lines"]) == []


def test_a_reason_is_of_what_there_is() -> None:
    for place in uncovered.REASONS:
        file, _, function = place.partition("::")
        text = (results_file.ROOT / file).read_text()
        assert re.search(rf"\b{function.rpartition('.')[2]}\b", text), place


def test_a_part_that_fails_is_reported(tmp_path: Path) -> None:
    outcome = soak.run("no_such_part", tmp_path, time.monotonic())
    assert isinstance(outcome, str) and "no_such_part" in outcome and "not found" in outcome


def test_a_part_ends_with_the_time_of_all(tmp_path: Path) -> None:
    outcome = soak.run("killed_runs", tmp_path, time.monotonic() - soak.LIMIT)
    assert outcome == "killed_runs: not finished within the 20 minutes of the whole"


@pytest.mark.parametrize("command", [coverage, soak])
def test_nothing_is_written_where_a_part_fails(
    command: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(soak, "PARTS", ("no_such_part",))
    monkeypatch.setitem(coverage.PARTS, "python", lambda: pytest.fail("a test failed"))
    with pytest.raises((SystemExit, pytest.fail.Exception)):
        command.main([f"--output={tmp_path / 'some.json'}"])  # type: ignore[attr-defined]
    assert not list(tmp_path.iterdir())


def test_all_parts_are_measured_unless_some_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    def named(*arguments: str) -> list[str]:
        return parts.parse(argparse.ArgumentParser(), ["first", "second"], arguments)[1]

    assert named() == ["first", "second"]
    assert named("second") == ["second"]
    with pytest.raises(SystemExit, match="2"):
        named("second", "third")
    assert "unknown part 'third'; expected some of first, second" in capsys.readouterr().err
