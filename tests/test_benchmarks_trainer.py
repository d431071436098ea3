"""The measurements of the trainer run its commands, and their table says what was found."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import trainer
from benchmarks.trainer_table import LINES, table


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """DenseNet-121 on a few images of 32x32."""
    monkeypatch.setattr(trainer, "SIZE", 32)
    monkeypatch.setattr(trainer, "JPEG_FILES", 80)
    monkeypatch.setattr(trainer, "IMAGES_IN_MEMORY", 64)


def test_the_table_has_a_line_for_every_measurement() -> None:
    run = {"seconds": 200.04, "images": 1000, "accuracy": 0.9904, "last_accuracy": 0.9896}
    rows = [
        {"name": "mnist"} | run,
        {"name": "demo"} | run,
        {"name": "data-path", "wait_share": 0.0123, "step_ms": 600.4},
        {"name": "overhead", "trainer_ms": 606.0, "bare_ms": 600.0, "added_mib": 5.0, "bare_mib": 1000.0},
        {"name": "large-images", "ours_gib": 2.004, "naive_gib": 17.0},
    ]
    assert [row["name"] for row in rows] == list(LINES) == list(trainer.MEASUREMENTS)
    text = "\n".join(table(rows))
    assert "200 s; 99.0% of 1000 held-out images (99.0% after the last epoch)" in text
    assert "1.2% of a step of 600 ms" in text
    assert "606 ms for 600 ms, +1.0%" in text and "+5.0 MiB, +0.5%" in text
    assert "2.00 GiB, everything included; naive model alone 17.00 GiB" in text


def test_the_trainers_steps_are_measured_in_turn_with_bare_ones(small: None, tmp_path: Path) -> None:
    row = trainer.measure_overhead(tmp_path)
    assert row["trainer_ms"] > 0 and row["bare_ms"] > 0 and row["bare_mib"] > 100


@pytest.mark.own_process
def test_the_data_path_is_measured_in_a_run(small: None, tmp_path: Path) -> None:
    row = trainer.measure_data_path(tmp_path)
    assert 0 < row["wait_share"] < 1 and row["step_ms"] > 0
