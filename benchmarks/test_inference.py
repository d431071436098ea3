"""An inference step: time and images per second."""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from .cells import Cell, Variant, make_timed


def test_inference(benchmark: BenchmarkFixture, cell: Cell, variant: Variant, pytestconfig: pytest.Config) -> None:
    option = pytestconfig.getoption
    benchmark.group = str(cell)
    step = make_timed(cell, variant, option("device"))["forward_ms"]
    benchmark.pedantic(step, rounds=option("rounds"), warmup_rounds=1)
    if benchmark.stats is not None:  # None with --benchmark-disable
        benchmark.extra_info["images_per_second"] = cell.batch / benchmark.stats["median"]
