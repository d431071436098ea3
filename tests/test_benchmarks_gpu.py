"""The command for a machine with a GPU, as far as it goes without one."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu, gpu_kernels, gpu_rows, gpu_tiles_table, report
from benchmarks.cells import Cell, Variant
from benchmarks.gpu import Stage
from benchmarks.gpu_rows import GRAPH, Measurement, plan
from benchmarks.implementations import IMPLEMENTATIONS
from benchmarks.picture import MARKS
from densenet_efficient import kernels
from densenet_efficient.kernels import CONTRACT

CELL = Cell("train", "tiny", "float32", 2, 32)


def a_measurement(kind: str = "times", implementation: str = "ours-none") -> Measurement:
    return Measurement(kind, CELL, Variant(implementation, "channels-last"))


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As most machines are; the question is asked once per process."""
    gpu.gpu.unsupported_card.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    yield
    gpu.gpu.unsupported_card.cache_clear()


def test_without_a_gpu_it_says_so_in_one_line(no_gpu: None, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"^benchmarks.gpu needs a GPU of compute capability 8.0 or newer: .*$"):
        gpu.main(["--output", str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_the_stages_name_files_that_exist() -> None:
    stages = {stage.name: stage for stage in gpu.fixed_stages("9.0", Path("card.json"))}
    assert {*stages, gpu.MEASUREMENTS} == set(gpu.STAGES)
    assert stages["build"].variables["TORCH_CUDA_ARCH_LIST"] == "9.0"
    named = {part for stage in stages.values() for part in stage.command if part.startswith("tests/")}
    assert all((gpu.results_file.ROOT / name).exists() for name in named)
    assert sum(stage.seconds for stage in stages.values()) < 10 * 60  # in practice they end much sooner


def test_stages_are_kept_in_the_results_as_they_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On a card that is made up, with stages that do nothing."""
    monkeypatch.setattr(gpu.gpu, "unsupported_card", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    header = gpu.results_file.describe_machine("cpu") | {"machine": "a-card"}
    monkeypatch.setattr(gpu.results_file, "describe_machine", lambda device: header)
    fate = {"tests": "failed with status 1", "measurements 1": "stopped after 99 s"}
    monkeypatch.setattr(gpu, "run", lambda stage, log, deadline: fate.get(stage.name, "passed"))
    path = tmp_path / "a-card.json"
    gpu.main(["--output", str(tmp_path), "--only", "memcheck"])
    assert json.loads(path.read_text())["checks"] == {"memcheck": "passed"}
    with pytest.raises(SystemExit, match=r"^not passed: tests; see .*gpu\.log$"):
        gpu.main(["--output", str(tmp_path), "--only", "tests", "measurements"])
    checks = json.loads(path.read_text())["checks"]
    assert checks == {"memcheck": "passed", "tests": fate["tests"], "measurements": "stopped after 99 s"}
    with pytest.raises(SystemExit):
        gpu.main(["--output", str(tmp_path), "--only", "everything"])


@pytest.mark.parametrize(
    ("code", "seconds", "outcome"),
    [
        ("print('fine')", 60, "passed"),
        ("import sys; sys.exit(3)", 60, "failed with status 3"),
        ("import time; time.sleep(60)", 1, "stopped after 1 s"),
    ],
)
def test_the_outcome_of_a_stage(tmp_path: Path, code: str, seconds: float, outcome: str) -> None:
    with (tmp_path / "log").open("ab") as log:
        assert gpu.run(Stage("a stage", [sys.executable, "-c", code], seconds), log, time.monotonic() + 60) == outcome
    assert (tmp_path / "log").read_text() == ("fine\n" if outcome == "passed" else "")


def test_a_stage_that_cannot_run(tmp_path: Path) -> None:
    with (tmp_path / "log").open("ab") as log:
        later = time.monotonic() + 60
        assert gpu.run(Stage("memcheck", ["no-such-sanitizer"], 60), log, later) == "no-such-sanitizer was not found"
        assert gpu.run(Stage("late", [sys.executable], 60), log, time.monotonic() - 1) == "no time was left"


RUN_A_STAGE = """
import sys, time
from benchmarks import gpu
gpu.exit_when_terminated()
with open(sys.argv[1], "ab") as log:
    stage = [sys.executable, "-uc", "import os, time; print(os.getpid()); time.sleep(600)"]
    gpu.run(gpu.Stage("long", stage, 600), log, time.monotonic() + 600)
"""


def test_a_termination_ends_the_running_stage_too(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with subprocess.Popen([sys.executable, "-c", RUN_A_STAGE, str(log)], cwd=gpu.results_file.ROOT) as process:
        while not (log.exists() and log.read_text().endswith("\n")):
            assert process.poll() is None
            time.sleep(0.1)
        process.terminate()
        assert process.wait(60) == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(int(log.read_text()), 0)


def test_measuring_is_taken_up_where_the_gpu_was_lost(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    outcomes = iter(["failed with status 1", "failed with status 1", "passed"])
    names = []
    monkeypatch.setattr(gpu, "run", lambda stage, log, deadline: names.append(stage.name) or next(outcomes))
    assert gpu.measure(tmp_path / "card.json", None, 0) == "passed"  # type: ignore[arg-type]
    assert names == ["measurements 1", "measurements 2", "measurements 3"]


def test_the_plan_begins_with_what_matters_and_ends_with_what_takes_minutes() -> None:
    measurements = plan()
    assert len(set(measurements)) == len(measurements)
    first = measurements[:6]
    assert {(measurement.cell.task, measurement.cell.model, measurement.cell.batch) for measurement in first} == {
        ("train", "densenet201", 128)
    }
    assert {measurement.variant.implementation for measurement in first} == {*gpu_rows.EAGER, *gpu_rows.GRAPHS}
    compiled = ["compile" in measurement.variant.implementation for measurement in measurements]
    assert compiled == sorted(compiled)
    implementations = {measurement.variant.implementation for measurement in measurements}
    assert {name.removesuffix(GRAPH) for name in implementations} <= IMPLEMENTATIONS.keys()
    assert implementations <= MARKS.keys()


@pytest.mark.parametrize("operation", CONTRACT)
def test_a_kernel_by_itself(operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_kernels, "CALLS", 1)
    sizes = {size for name, size in gpu_kernels.plan(images=1) if name == operation and size.side < 28}
    for size in sizes or {gpu_kernels.Size(1, 12, 64, 64)}:
        row = gpu_kernels.measure(kernels.reference, operation, size, "cpu")
        assert row["microseconds"] > 0
        assert row["gigabytes_per_second"] > 0
        assert (row["teraflops"] > 0) == ("conv" in operation)


def test_the_bytes_and_operations_of_a_kernel() -> None:
    size = gpu_kernels.Size(2, 7, 96, 160)
    arguments = gpu_kernels.arguments_of("bn_relu_conv1x1", size, torch.bfloat16, "cpu")
    assert arguments["x"].shape == (98, 96)
    assert arguments["x"].stride() == (160, 1)
    vectors, statistics, weight = 2 * 96 * 4, 2 * 128 * 4, 96 * 128 * 4
    assert gpu_kernels.bytes_of("bn_relu_conv1x1", arguments) == 98 * (96 + 128) * 2 + vectors + statistics + weight
    assert gpu_kernels.operations_of("bn_relu_conv1x1", arguments) == 2 * 98 * 96 * 128
    arguments = gpu_kernels.arguments_of("project_gradient", size, torch.bfloat16, "cpu")
    assert gpu_kernels.bytes_of("project_gradient", arguments) == 98 * 32 * 2 * 3 + 3 * 32 * 4


def test_times_of_a_tiny_network() -> None:
    row = gpu_rows.measure_times(CELL, Variant("ours-none", "channels-last"), "cpu", seconds=0.05)
    assert list(row) == ["step_ms", "forward_ms", "images_per_second"]
    assert row["forward_ms"] > 0
    assert row["images_per_second"] == pytest.approx(2e3 / row["step_ms"], rel=0.05)


def test_steps_are_timed_together(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(0, 10**6, 10))
    calls = []
    monkeypatch.setattr(gpu_rows.time, "perf_counter", lambda: next(now) / 1e3)
    assert gpu_rows.time_step(lambda: calls.append(1), seconds=0.2, rounds=5) == pytest.approx(10 / 4)
    assert len(calls) == gpu_rows.WARM_UP + 1 + 5 * 4


def test_memory_is_the_slope_of_the_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_rows, "peak_bytes", lambda cell, variant, batch, device: (7 + 3 * batch) * 2**20)
    assert gpu_rows.measure_memory(CELL, Variant("ours-none", "channels-last"), "cuda") == {"mib_per_image": 3.0}


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError(), RuntimeError("Triton Error [CUDA]: out of memory"), RuntimeError("an illegal")]
)
def test_the_largest_batch_is_tried(monkeypatch: pytest.MonkeyPatch, error: RuntimeError) -> None:
    tried = []

    def peak_bytes(cell: Cell, variant: Variant, batch: int, device: str, steps: int = 3) -> int:
        tried.append(batch)
        if batch > 970:
            raise error
        return batch * 2**20

    monkeypatch.setattr(gpu_rows, "peak_bytes", peak_bytes)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000 * 2**20, 0))
    variant = Variant("ours-none", "channels-last")
    if "illegal" in str(error):
        with pytest.raises(RuntimeError, match="an illegal"):
            gpu_rows.measure_largest_batch(CELL, variant, "cuda")
        return
    assert gpu_rows.measure_largest_batch(CELL, variant, "cuda") == {"largest_batch": 960}
    assert tried[2:] == [1000, 980, 960]


@pytest.fixture
def measures(monkeypatch: pytest.MonkeyPatch) -> list[Measurement]:
    """Records what is measured instead of measuring it; the times of torchvision fail."""
    asked: list[Measurement] = []

    def fake(kind: str, measured: dict[str, float]) -> Any:
        def measure(cell: Cell, variant: Variant, device: str) -> dict[str, float]:
            asked.append(Measurement(kind, cell, variant))
            if (kind, variant.implementation) == ("times", "torchvision"):
                raise ValueError("no such thing\non line 2")
            return measured

        return measure

    results = {"times": {"step_ms": 5.0}, "memory": {"mib_per_image": 3.0}, "largest_batch": {"largest_batch": 99}}
    monkeypatch.setattr(gpu_rows, "MEASURES", {kind: fake(kind, row) for kind, row in results.items()})
    return asked


def test_every_figure_and_failure_is_kept_at_once_and_measured_once(
    measures: list[Measurement], tmp_path: Path
) -> None:
    path = tmp_path / "card.json"
    todo = [a_measurement(implementation="torchvision"), *map(a_measurement, ["times", "memory", "largest_batch"])]
    for number in range(1, len(todo) + 1):
        gpu_rows.run(path, todo[:number], "cpu")
        results = json.loads(path.read_text())
        assert measures == todo[:number]
    assert [(row["implementation"], row["reason"]) for row in results["failed"]] == [
        ("torchvision", "ValueError: no such thing")
    ]
    assert [(row["step_ms"], row["mib_per_image"]) for row in results["rows"]] == [(5.0, 3.0)]
    assert [(row["implementation"], row["batch"]) for row in results["largest_batch"]] == [("ours-none", 99)]
    text = report.summary(results)
    assert "The largest batch of 32x32 images whose float32 step of tiny fits: ours-none 99." in text


def test_another_commit_measures_anew_what_it_is_asked_for(
    measures: list[Measurement], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, todo = tmp_path / "card.json", [a_measurement(kind) for kind in ("times", "memory", "largest_batch")]
    header = gpu_rows.results_file.describe_machine("cpu")
    for commit in ("older", "newer"):
        monkeypatch.setattr(gpu_rows.results_file, "describe_machine", lambda device: header | {"commit": commit})  # noqa: B023
        gpu_rows.run(
            path, todo[:2] if commit == "newer" else [*todo, a_measurement(implementation="torchvision")], "cpu"
        )
    assert measures[4:] == todo[:2]
    results = json.loads(path.read_text())
    assert results["failed"] == [] and all("commits" not in row for row in results["rows"])
    assert [row["commit"] for row in results["largest_batch"]] == ["older"]
    gpu_rows.run(path, todo, "cpu")
    assert measures[6:] == todo[2:]
    assert ["commit" in row for row in json.loads(path.read_text())["largest_batch"]] == [False]


needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="torch brings Triton on Linux only")


@needs_triton
def test_a_kernel_takes_a_tile_and_gives_it_back() -> None:
    from benchmarks.gpu_tiles import KERNELS, TRITON, tile_of

    for kernel in KERNELS:
        module = importlib.import_module(f"{TRITON}.{kernel.file}")
        own = module._tile
        with tile_of(kernel.file, kernel.candidates[0]):
            assert module._tile(1, 2, 3) is kernel.candidates[0]
        with tile_of(kernel.file, None):
            assert module._tile is own
        assert module._tile is own


@needs_triton
def test_a_tile_that_fails_is_written_down(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import gpu_tiles

    times = iter([30.0, 20.0])

    def microseconds(call: object) -> float:
        time = next(times, None)
        if time is None:
            raise RuntimeError("out of resource\nshared memory")
        return time

    monkeypatch.setattr(gpu_tiles, "microseconds", microseconds)
    kernel, size = gpu_tiles.KERNELS[0], gpu_kernels.Size(1, 7, 96, 160)
    rows = list(gpu_tiles.measure(kernel, size, "cpu"))
    assert [row["tile"] for row in rows] == [None, *kernel.candidates]
    assert [row["microseconds"] for row in rows] == [30.0, 20.0] + [None] * (len(rows) - 2)
    assert {row.get("reason") for row in rows[2:]} == {"RuntimeError: out of resource"}
    assert set(gpu_tiles_table.BARE) == {kernel.file for kernel in gpu_tiles.KERNELS}


def test_the_fastest_tile_stands_beside_the_bare_product() -> None:
    rows = [
        {"kernel": "bn_relu_conv3x3", "side": side, "tile": tile, "microseconds": time}
        for side, tile, time in [(7, [64], 16.0), (7, [128], 12.4), (14, [64], 31.0), (14, [128], None)]
    ]
    products = [{"product": "conv3x3", "side": side, "microseconds": time} for side, time in [(7, 5.5), (14, 9.6)]]
    lines = gpu_tiles_table.table({"rows": rows, "products": products})
    assert lines[0] == "| kernel, with all that is fused / bare | 14x14 | 7x7 |"
    assert lines[2] == "| `bn_relu_conv3x3` | 31 / 10 | 12 / 6 |"
