"""The results file of a machine: what a run writes, keeps, replaces and names."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmark_cases import HEADER, KEY

from benchmarks import markdown, planner, run
from benchmarks import results as results_file
from benchmarks.cells import Cell, measure_times


def measure_tiny(path: Path, *options: str) -> dict[str, Any]:
    workload = ["--models=tiny", "--dtypes=float32", "--batches=2", "--size=32", "--rounds=1"]
    run.main(["--measure=times", *workload, f"--output={path}", *options])
    return json.loads(path.read_text())


def test_a_run_writes_a_header_and_one_row_per_measurement(tmp_path: Path) -> None:
    results = measure_tiny(tmp_path / "machine.json", "--implementations", "torchvision", "ours-bottleneck")
    assert results["header"].keys() == HEADER.keys()
    assert results["header"]["versions"]["torch"] == torch.__version__
    assert socket.gethostname() not in json.dumps(results)
    assert [(row["task"], row["implementation"], row["layout"]) for row in results["rows"]] == [
        ("train", "torchvision", "channels-last"),
        ("train", "torchvision", "contiguous"),
        ("train", "ours-bottleneck", "channels-last"),
        ("infer", "torchvision", "channels-last"),
        ("infer", "torchvision", "contiguous"),
    ]
    for row in results["rows"]:
        assert set(row) == {*results_file.KEY, *results_file.MEASURED}
        assert row["images_per_second"] == pytest.approx(2e3 / row["step_ms"], rel=0.05)
        assert row["mib_per_image"] is None


def test_a_folder_is_no_results_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Said before anything is measured."""
    with pytest.raises(SystemExit):
        run.main(["--models=tiny", f"--output={tmp_path}"])
    expected = f"argument --output: {tmp_path} is a folder; name a file, such as {tmp_path / 'results.json'}"
    assert capsys.readouterr().err.splitlines()[-1].endswith(expected)


def test_the_results_of_each_kind_have_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert results_file.default_path({"machine": "some-cpu"}).name == "some-cpu.json"
    assert results_file.default_path({"machine": "some-cpu"}, "planner").name == "some-cpu-planner.json"
    with pytest.raises(SystemExit):
        planner.main(["--help"])
    assert "default: benchmarks/results/<machine>-planner.json" in " ".join(capsys.readouterr().out.split())


def test_running_a_cell_again_replaces_only_its_rows(tmp_path: Path) -> None:
    path = tmp_path / "machine.json"
    first = measure_tiny(path, "--implementations", "naive", "ours-none")
    first["rows"][0] |= {"step_ms": -1.0, "mib_per_image": 12.0}
    first["rows"][1]["step_ms"] = -1.0
    results_file.save(path, first)
    second = measure_tiny(path, "--tasks=train", "--implementations=naive")
    assert second["rows"][0]["step_ms"] > 0
    assert second["rows"][0]["mib_per_image"] == 12.0
    assert second["rows"][1:] == first["rows"][1:]


def test_an_interrupted_run_keeps_the_cells_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(cell: Cell, *arguments: Any) -> Any:
        if cell.task == "infer":
            raise KeyboardInterrupt
        return measure_times(cell, *arguments)

    monkeypatch.setattr(run, "measure_times", interrupted)
    with pytest.raises(KeyboardInterrupt):
        measure_tiny(tmp_path / "machine.json", "--implementations=ours-none")
    (row,) = json.loads((tmp_path / "machine.json").read_text())["rows"]
    assert (row["task"], row["implementation"]) == ("train", "ours-none")


def test_a_failed_write_leaves_the_previous_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "machine.json"
    results = results_file.load(path, HEADER)
    results_file.record(results, KEY, step_ms=5.0)
    results_file.save(path, results)
    before = path.read_text()

    def fail(descriptor: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    results_file.record(results, KEY, step_ms=6.0)
    with pytest.raises(OSError, match="no space left"):
        results_file.save(path, results)
    assert path.read_text() == before
    assert list(tmp_path.iterdir()) == [path]


def test_results_of_other_versions_are_not_mixed(tmp_path: Path) -> None:
    path = tmp_path / "machine.json"
    results_file.save(path, results_file.load(path, HEADER))
    with pytest.raises(ValueError, match=r"holds results of versions .*2\.14\.1.*remove the file"):
        results_file.load(path, HEADER | {"versions": {"torch": "3.0"}})


def test_figures_of_another_commit_keep_its_name(tmp_path: Path) -> None:
    path, older, newer = tmp_path / "machine.json", HEADER["commit"], "ba9876543210"
    results = results_file.load(path, HEADER) | {"checks": {"tests": "passed"}}
    results["first_step"] = [{"model": "tiny", "implementation": "ours-none", "seconds": 3.0}]
    results_file.record(results, KEY, step_ms=5.0, mib_per_image=2.0)
    results_file.save(path, results)
    assert "commits" not in results_file.load(path, HEADER)["rows"][0]
    results = results_file.load(path, HEADER | {"commit": newer})
    results_file.record(results, KEY, step_ms=6.0)
    assert "checks" not in results
    assert results["rows"][0]["commits"] == {"mib_per_image": older}
    assert [results_file.is_current(results["rows"][0], figure) for figure in ("step_ms", "mib_per_image")] == [
        True,
        False,
    ]
    line = markdown.figures_line(results)
    assert f"commit {newer}" in line
    assert f"Of earlier code, commit {older}: training memory of tiny, float32, batch 8; the first step." in line
    results_file.record(results, KEY, mib_per_image=3.0)
    assert "commits" not in results["rows"][0]


def test_rows_of_another_commit_keep_its_name(tmp_path: Path) -> None:
    path, older = tmp_path / "machine-training.json", HEADER["commit"]
    results = results_file.load(path, HEADER)
    order = ("mnist", "demo", "data-path")
    for row in ({"seconds": 3.0}, {"seconds": 3.0}, {"wait_share": 0.01, "step_ms": 5.0}):
        name = order[len(results["rows"])]
        results_file.replace_row(results, {"name": name} | row, "name", order)
    results_file.save(path, results)
    results = results_file.load(path, HEADER | {"commit": "ba9876543210"})
    results_file.replace_row(results, {"name": "mnist", "seconds": 2.0}, "name", order)
    assert f"Of earlier code, commit {older}: demo; data-path." in markdown.figures_line(results)
