"""The Triton backend against the formulas in plain torch: in Triton's interpreter, and on a card where there is one.

Each is a process of its own, for Triton decides at its import whether it interprets.
"""

import os

import pytest
import torch
from processes import assert_passes_alone

on_a_card = pytest.param("0", id="card", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))


@pytest.mark.parametrize("interpret", [pytest.param("1", id="interpreter"), on_a_card])
def test_every_operation(interpret):
    environment = os.environ | {"TRITON_INTERPRET": interpret, "OMP_NUM_THREADS": "1"}
    assert_passes_alone("triton_operations.py", environment)
