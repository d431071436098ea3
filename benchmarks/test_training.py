"""A training step and its forward: time, images per second and memory per image."""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from .cells import Cell, Variant, make_timed, measure_memory


@pytest.mark.parametrize("part", ["step_ms", "forward_ms"])
def test_training(
    benchmark: BenchmarkFixture, cell: Cell, variant: Variant, part: str, pytestconfig: pytest.Config
) -> None:
    option = pytestconfig.getoption
    benchmark.group = f"{cell} {part}"
    timed = make_timed(cell, variant, option("device"))[part]
    benchmark.pedantic(timed, rounds=option("rounds"), warmup_rounds=1)
    if benchmark.stats is not None:  # None with --benchmark-disable
        benchmark.extra_info["images_per_second"] = cell.batch / benchmark.stats["median"]
    if part == "step_ms" and not option("no_memory"):
        benchmark.extra_info["mib_per_image"] = measure_memory(cell, variant, option("device"))
