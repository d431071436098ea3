"""The table and the picture that the README opens with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks import headline

CPU = {"device": "cpu", "cpu": "Some CPU", "cores": 2, "instructions": "AVX512"}
GPU = CPU | {"device": "Some GPU"}
WORKLOAD = {"task": "train", "model": "densenet201", "dtype": "float32", "batch": 8, "size": 224}


def results_on(header: dict[str, Any], **figures: tuple[float | None, float | None]) -> dict[str, Any]:
    """A results file with the milliseconds and MiB of implementations, whose names have underscores here."""
    rows = [
        WORKLOAD | {"implementation": name.replace("_", "-"), "layout": "channels-last", "step_ms": time}
        | {"mib_per_image": memory}
        for name, (time, memory) in figures.items()
    ]  # fmt: skip
    return {"header": header, "rows": rows}


MEASURED = {"torchvision": (100.0, 200.0), "ours_none": (50.0, 25.0), "ours_bottleneck": (60.0, 10.0)}


def test_a_line_per_step_those_of_cpus_first() -> None:
    graphs = {"torchvision_graph": (80.0, None), "ours_none_graph": (20.0, None)}
    lines = headline.section([results_on(GPU, **MEASURED, **graphs), results_on(CPU, **MEASURED)]).splitlines()
    cells = "100 ms | 50 ms | 0.50 | 60 ms | 0.60 | 200.0 | 25.0 (8.0x less) | 10.0 (20.0x less) |"
    assert lines[4:7] == [
        f"| Some CPU, 2 cores, AVX512: float32, batch 8 | {cells}",
        f"| Some GPU: float32, batch 8 | {cells}",
        "| Some GPU: float32, batch 8, in a CUDA graph | 80 ms | 20 ms | 0.25 |  |  | 200.0 | 25.0 (8.0x less) |  |",
    ]


def test_only_what_has_a_time_and_a_memory_is_a_line() -> None:
    timed = results_on(CPU, torchvision=(100.0, None), ours_none=(50.0, 25.0))
    assert headline.section([timed]) == "densenet201 was not measured yet."
    [line] = headline.section([results_on(CPU, torchvision=(100.0, 200.0), ours_none=(50.0, 25.0))]).splitlines()[4:5]
    assert (
        line
        == "| Some CPU, 2 cores, AVX512: float32, batch 8 | 100 ms | 50 ms | 0.50 |  |  | 200.0 | 25.0 (8.0x less) |  |"
    )
    assert headline.section([results_on(CPU, ours_none=(50.0, None))]) == "densenet201 was not measured yet."
    other = results_on(CPU, **MEASURED)
    for row in other["rows"]:
        row["model"] = "densenet121"
    assert headline.section([other]) == "densenet201 was not measured yet."


def test_the_picture_shows_shares_of_torchvision(tmp_path: Path, monkeypatch: Any) -> None:
    figures = []
    monkeypatch.setattr(headline, "save_figure", lambda figure, path: figures.append((figure, path)))
    headline.draw([results_on(CPU, **MEASURED)], tmp_path / "picture.png")
    [(figure, path)] = figures
    assert path == tmp_path / "picture.png"
    time, memory = figure.axes
    assert {line.get_label(): line.get_xydata().tolist() for line in time.lines[1:]} == {
        'ours, "none"': [[0.5, 0.0]],
        'ours, "bottleneck"': [[0.6, 0.0]],
    }
    assert [line.get_xdata().tolist() for line in memory.lines[1:]] == [[0.125], [0.05]]


def test_no_picture_of_nothing(tmp_path: Path) -> None:
    headline.draw([], tmp_path / "picture.png")
    assert not list(tmp_path.iterdir())
    headline.draw([results_on(CPU, **MEASURED)], tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
