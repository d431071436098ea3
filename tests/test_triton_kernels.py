"""The Triton backend against the formulas in plain torch: in Triton's interpreter, and on a card where there is one.

Each is a process of its own, for Triton decides at its import whether it interprets.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

OPERATIONS = Path(__file__).with_name("triton_operations.py")
on_a_card = pytest.param("0", id="card", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))


@pytest.mark.parametrize("interpret", [pytest.param("1", id="interpreter"), on_a_card])
def test_every_operation(interpret):
    environment = os.environ | {"TRITON_INTERPRET": interpret, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(OPERATIONS)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
