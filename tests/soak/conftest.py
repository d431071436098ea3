"""How long the parts of the reliability suite run: shortly among the other tests, in full under `make soak`."""

import json
import os
from pathlib import Path

import pytest

FIGURES = os.environ.get("DENSENET_EFFICIENT_SOAK")  # the file that `python -m benchmarks.soak` reads


@pytest.fixture(scope="session")
def in_full():
    """Whether to run everything."""
    return FIGURES is not None


@pytest.fixture
def record():
    """Adds named figures to those of the run."""

    def add(**figures):
        if FIGURES:
            path = Path(FIGURES)
            path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | figures))

    return add
