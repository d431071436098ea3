"""What the documents show as evidence: measured in fresh processes, drawn and written from the results files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from test_benchmarks import HEADER

from benchmarks import report
from benchmarks import results as results_file
from benchmarks.cells import Cell, Variant, row_key
from benchmarks.evidence import __main__ as evidence
from benchmarks.evidence import comparison, frontier, largest_image, scaling, steps, timeline
from benchmarks.implementations import build
from densenet_efficient.measure import MIB
from densenet_efficient.models import create_model
from densenet_efficient.summary import summarize, total_costs

MEASURED = {"step_ms": 400.0, "forward_ms": 150.0, "images_per_second": 20.0}


def step_rows() -> list[dict[str, Any]]:
    """A row of the frontier's format for each of its implementations."""
    return [
        row_key(frontier.CELL, Variant(name, "channels-last")) | MEASURED | {"mib_per_image": 10.0 + index}
        for index, name in enumerate(frontier.IMPLEMENTATIONS)
    ]


def scaling_rows() -> list[dict[str, Any]]:
    points = [{"against": against, "model": "some", "size": 32} for against in ("depth", "size", "batch")]
    return [
        point | {"value": value, "implementation": name, "batches": [1, 2], "mib": value / 8}
        for point in points
        for name in ("naive", "ours-none")
        for value in (40, 100)
    ]


TIMELINE = {
    "model": "densenet201",
    "size": 224,
    "batch": 8,
    "dtype": "float32",
    "implementation": "torchvision",
    "phases_ms": {"forward": 10, "backward": 30, "optimizer": 31},
    "kept_mib": 800.2,
    "peak_mib": 900.0,
    "timeline": [[2, 50], [9, 800], [12, 900], [30, 7]],
}
LARGEST = {
    "model": "densenet201",
    "implementation": "ours-bottleneck",
    "dtype": "float32",
    "limit_mib": 8192,
    "predicted": 6000,
    "largest": 5952,
    "peak_mib": 8100.4,
    "refused": 6016,
}


def comparison_results() -> dict[str, Any]:
    weights = {"name": "Some_Weights.V1", "top1": 76.13, "size": 224, "source": "https://example.org/recipe"}
    network = {"model": "resnet50", "size": 224, "parameters": 25557032, "multiply_adds": 4089184256}
    rows = []
    for layout, speed in (("channels-last", 10.0), ("contiguous", 12.0)):
        for task, mib in (("train", 80.0 + speed), ("infer", None)):
            key = row_key(Cell(task, "resnet50", "float32", 8, 224), Variant("timm", layout))
            rows.append(key | MEASURED | {"images_per_second": speed, "mib_per_image": mib})
    return {"rows": rows, "networks": [network | {"weights": [weights]}]}


@pytest.fixture
def published(tmp_path: Path) -> list[str]:
    """The lines of a document of all these sections, filled from results of every part."""
    folder = tmp_path / "results"
    results: dict[str, dict[str, Any]] = {
        "scaling": {"rows": scaling_rows()},
        "timeline": {"rows": [TIMELINE]},
        "frontier": {"rows": step_rows(), "rounds": 5},
        "largest-image": {"rows": [LARGEST]},
        "comparison": comparison_results(),
    }
    assert results.keys() == evidence.PARTS.keys()
    for part, content in results.items():
        results_file.save(folder / f"some-cpu-{part}.json", {"header": HEADER, **content})
    document = tmp_path / "evidence.md"
    names = [f"{part}-cpu" for part in results]
    document.write_text("\n".join(f"<!-- benchmarks:begin {name} -->\n<!-- benchmarks:end -->" for name in names))
    report.main([f"--documents={document}", f"--results={folder}", f"--pictures={tmp_path / 'pictures'}"])
    return document.read_text().splitlines()


def test_the_sections_hold_what_was_measured(published: list[str]) -> None:
    assert '| depth | naive | ours, "none" |' in published
    assert "| 100 | 12.5 | 12.5 |" in published
    assert "| torchvision | 800.2 | 900.0 |" in published
    assert '| ours, "bottleneck" | 6000x6000 | 5952x5952 | 35.4 | 8100 | 6016x6016 |' in published
    resnet = "| resnet50 | 25.6 M | 4.09 G | 224x224 | 90.0 | 12.0 | 12.0 | [76.1](https://example.org/recipe) |"
    assert resnet in published  # the smaller memory and the higher speed of the two layouts
    assert "| block-checkpoint | channels-last | 400 ms | 1.00 | 150 ms | 20.0 | 12.0 | 0.8x |" in published
    assert any("Times are medians of 5 rounds." in line for line in published)


def test_every_picture_that_is_shown_is_drawn(published: list[str], tmp_path: Path) -> None:
    shown = [line.split("](pictures/")[1].rstrip(")") for line in published if "](pictures/" in line]
    assert len(shown) == 4
    for name in shown:
        with Image.open(tmp_path / "pictures" / name) as image:
            assert image.format == "PNG" and min(image.size) > 300


def test_the_documents_match_the_results_files() -> None:
    report.main(["--check"])


def test_points_that_are_held_are_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[scaling.Point] = []

    def measure_point(point: scaling.Point) -> dict[str, Any]:
        asked.append(point)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return vars(point) | {"batches": [1, 2], "mib": 1.0}

    monkeypatch.setattr(scaling, "measure_point", measure_point)
    path = tmp_path / "some.json"
    with pytest.raises(KeyboardInterrupt):
        scaling.measure(path)
    scaling.measure(path)
    points = list(scaling.plan())
    assert asked == points[:3] + points[2:]
    assert len(json.loads(path.read_text())["rows"]) == len(points)


@pytest.mark.parametrize("point", [point for point in scaling.plan() if point.against != "batch"])
def test_batches_are_large_enough_to_measure_and_small_enough_to_run(point: scaling.Point) -> None:
    smaller, larger = scaling.batches_for(point)
    assert larger == 2 * smaller and 2 <= larger <= scaling.LARGEST_BATCH


def test_networks_of_any_depth() -> None:
    with torch.device("meta"):
        known = create_model("densenet-bc-100-12")
        assert build("ours-bottleneck", "densenet-bc-100-12").state_dict().keys() == known.state_dict().keys()


@pytest.mark.parametrize(("implementation", "saved"), [("naive", "saved_naive"), ("ours-none", "saved_none")])
def test_a_timeline_follows_the_step(implementation: str, saved: str, one_thread: None) -> None:
    """From nothing to nothing, and after the forward what the summary counts, but for the images."""
    request = {"implementation": implementation, "model": "tiny", "size": 64, "batch": 64, "dtype": "float32"}
    row = timeline.trace(request)
    forward, backward, optimizer = row["phases_ms"].values()
    assert 0 < forward < backward <= optimizer
    moments, mib = zip(*row["timeline"], strict=True)
    assert len(moments) <= timeline.POINTS and list(moments) == sorted(moments) and moments[-1] <= optimizer + 1
    assert mib[-1] == 0 and max(mib) == row["peak_mib"] >= row["kept_mib"]
    shape = (64, 3, 64, 64)
    counted = getattr(total_costs(summarize(build(implementation, "tiny"), shape)), saved) / MIB
    assert row["kept_mib"] + 64 * 3 * 64 * 64 * 4 / MIB == pytest.approx(counted, rel=0.02)


@pytest.mark.parametrize("limit", [5, 37, 64, 100])
@pytest.mark.parametrize("start", [10, 64])
def test_the_largest_is_found_from_either_side(limit: int, start: int) -> None:
    if limit < 10:
        limit += 10
    assert largest_image.largest_that(lambda size: size <= limit, start // 5 * 5, 5) == limit // 5 * 5


def test_a_size_is_predicted_from_two_smaller_ones() -> None:
    peaks = {size: 300 + 2e-3 * size**2 for size in (512, 1024)}
    assert largest_image.predict(peaks, 300 + 2e-3 * 2000**2) in (1999, 2000)


def test_a_confined_process_trains_or_is_refused() -> None:
    assert 200 < largest_image.step_peak("torchvision", 64, 3000) <= 3000
    with pytest.raises(MemoryError, match="failed in a fresh process"):
        largest_image.step_peak("torchvision", 448, 1000)


def test_another_failure_is_not_taken_for_a_lack_of_memory() -> None:
    with pytest.raises(RuntimeError, match="unknown implementation 'fastest'"):
        largest_image.step_peak("fastest", 256, None)


def test_steps_are_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cell, variant = Cell("train", "tiny", "float32", 2, 32), Variant("naive", "channels-last")
    monkeypatch.setattr(steps, "measure_memory", lambda *_, batches: float(sum(batches)))
    monkeypatch.setattr(steps, "measure_times_together", lambda pairs, rounds: dict.fromkeys(pairs, MEASURED))
    path = tmp_path / "some.json"
    steps.measure_steps(path, [(cell, variant)], rounds=3)
    first = json.loads(path.read_text())
    assert first["rows"] == [row_key(cell, variant) | MEASURED | {"mib_per_image": 24.0}]
    assert first["rounds"] == 3
    monkeypatch.undo()  # a second measurement of this would take another time
    steps.measure_steps(path, [(cell, variant)], rounds=5)
    assert json.loads(path.read_text()) == first


@pytest.mark.parametrize(("model", "giga"), [("densenet121", 2.834), ("resnet50", 4.089), ("convnext_tiny", 4.456)])
def test_networks_are_counted_as_torchvision_counts_them(model: str, giga: float) -> None:
    """Its published figures, with which the count of parameters comes too."""
    network = comparison.describe(model, 224)
    assert network["multiply_adds"] / 1e9 == pytest.approx(giga, abs=1e-3)
    assert network["parameters"] == published_parameters(model)


def published_parameters(model: str) -> int:
    import torchvision

    return torchvision.models.get_weight(comparison.WEIGHTS[model][0]).meta["num_params"]


def test_an_unknown_part_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        evidence.main(["speed"])
    assert "unknown part 'speed'; expected some of scaling" in capsys.readouterr().err
