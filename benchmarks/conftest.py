"""Options of `pytest benchmarks --benchmark-only`, which uses the measuring of `python -m benchmarks.run`."""

from __future__ import annotations

import pytest

from densenet_efficient.measure import DTYPES

from .cells import ON_A_GPU, Cell, variants_of
from .implementations import IMPLEMENTATIONS


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("densenets")
    group.addoption("--models", nargs="+", default=["densenet121"])
    group.addoption(
        "--implementations",
        nargs="+",
        choices=list(IMPLEMENTATIONS),
        default=[name for name in IMPLEMENTATIONS if name not in ON_A_GPU],
    )
    group.addoption("--dtype", choices=DTYPES, default="float32")
    group.addoption("--batch", type=int, default=8)
    group.addoption("--size", type=int, default=224, help="height and width of the images")
    group.addoption("--rounds", type=int, default=5)
    group.addoption("--device", default="cpu")
    group.addoption("--no-memory", action="store_true", help="no memory per image, which needs fresh processes")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    option = metafunc.config.getoption
    task = "infer" if metafunc.module.__name__.endswith("test_inference") else "train"
    cells = [Cell(task, model, option("dtype"), option("batch"), option("size")) for model in option("models")]
    metafunc.parametrize("cell", cells, ids=lambda cell: cell.model)
    variants = variants_of(option("implementations"), task, option("dtype"))
    metafunc.parametrize("variant", variants, ids=lambda variant: f"{variant.implementation}-{variant.layout}")
