"""The planner's predictions beside measured memory: what is measured, once, between which batches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import planner
from benchmarks import results as results_file
from benchmarks.markdown import figures_line
from benchmarks.planner import GRID, MIXED, Workload
from benchmarks.results import RESULTS


@pytest.mark.parametrize("workload", GRID[::6], ids=str)
def test_the_batches_are_large_enough_to_measure(workload: Workload) -> None:
    smaller, larger = planner.batches_of(workload)
    mib = planner.predict(workload, (smaller, larger))
    assert larger == planner.TIMES * smaller
    assert smaller * mib == pytest.approx(planner.SMALLER_MIB, rel=0.05)


def test_a_run_that_was_cut_off_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the batches between which each workload was measured, whatever would be chosen now."""
    asked: list[Workload] = []

    def measure(workload: Workload, batches: tuple[int, int]) -> float:
        asked.append(workload)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return 10.0

    monkeypatch.setattr(planner, "measure", measure)
    grid = [Workload("train", "densenet-40-12", size, "float32", "none") for size in range(32, 37)]
    monkeypatch.setattr(planner, "GRID", grid)
    path = tmp_path / "some-planner.json"
    with pytest.raises(KeyboardInterrupt):
        planner.main(["--output", str(path)])
    before = rows_of(path)
    monkeypatch.setattr(planner, "TIMES", 2)
    planner.main(["--output", str(path)])
    rows = rows_of(path)
    assert asked == [*grid[:3], *grid[2:]]
    assert rows[:2] == before and len(rows) == 5
    assert [row["batches"][1] // row["batches"][0] for row in rows] == [4, 4, 2, 2, 2]


def test_what_earlier_code_has_measured_keeps_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    header = results_file.describe_machine()
    path = tmp_path / "some-planner.json"
    monkeypatch.setattr(planner, "measure", lambda workload, batches: 10.0)
    for commit, sizes in (("first", (32,)), ("second", (32, 33))):
        grid = [Workload("train", "densenet-40-12", size, "float32", "none") for size in sizes]
        monkeypatch.setattr(planner, "GRID", grid)
        monkeypatch.setattr(results_file, "describe_machine", lambda commit=commit: header | {"commit": commit})
        planner.main(["--output", str(path)])
    assert [row.get("commit") for row in rows_of(path)] == ["first", None]
    line = figures_line(json.loads(path.read_text()))
    assert line.endswith("Of earlier code, commit first: training memory of densenet-40-12.")


def rows_of(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"]
    return rows


def test_the_table_has_a_line_for_every_workload() -> None:
    rows = [planner.row_of(Workload("train", "densenet121", 224, "float32", MIXED), (10, 30), 12.0)]
    *_, line = planner.table(rows)
    predicted = rows[0]["predicted"]
    assert line == (
        "| train | densenet121 | 224x224 | float32 | bottleneck, bottleneck, bottleneck, none | 10, 30 "
        f"| {predicted:.2f} | 12.00 | {predicted / 12 - 1:+.1%} |"
    )


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*-planner.json")), ids=lambda path: path.stem)
def test_what_is_predicted_now_is_within_five_percent_of_what_was_measured(path: Path) -> None:
    rows = rows_of(path)
    assert len(rows) == len(GRID)
    for row in rows:
        *key, level = (row[name] for name in Workload.__dataclass_fields__)
        workload = Workload(*key, level if isinstance(level, str) else tuple(level))
        assert abs(planner.row_of(workload, tuple(row["batches"]), row["measured"])["error"]) <= 0.05, workload
