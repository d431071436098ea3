"""Every operation of the contract on the Triton backend, against the formulas in plain torch.

On a card, or in Triton's interpreter where TRITON_INTERPRET=1 is set. The interpreter has to be chosen before anything
imports Triton, so `test_triton_kernels.py` runs this file in a process of its own. The cases, the measure of the errors
and their bounds are those of the other backends.
"""

import os

import kernel_cases
import pytest
import torch
from kernel_cases import OVER_ROWS, Factory, assert_same_finite, assert_statistics_of_stored, cast, run

from densenet_efficient.kernels import reference
from densenet_efficient.kernels import triton as backend

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
if INTERPRETED:
    import triton_interpreter

    triton_interpreter.mend()

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# images, height, width, input channels, output channels
GEOMETRIES = [
    (1, 1, 1, 1, 1),
    (1, 1, 2, 3, 3),
    (1, 3, 3, 17, 12),
    (2, 5, 4, 32, 48),
    (2, 9, 8, 150, 12),
    (1, 4, 9, 33, 150),
    (4, 7, 7, 128, 32),
    (3, 13, 11, 96, 128),
]
LARGE = [] if INTERPRETED else [(1, 8, 9, 513, 48), (2, 2, 3, 1, 513), (2, 1, 300, 24, 16), (2, 56, 56, 224, 128)]
OPERATIONS = backend.__all__


def assert_exact(case, dtype, **others):
    kernel_cases.assert_exact(backend, case, dtype, device=DEVICE, **others)


def arguments_of(case, dtype):
    return cast(case, dtype, DEVICE)


def only(operations):
    """Those that this backend has, of ``operations``."""
    return [operation for operation in operations if operation in OPERATIONS]


@pytest.fixture(autouse=True)
def exact_products(monkeypatch):
    """float32 is not rounded to tf32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES + LARGE, ids=lambda geometry: "x".join(map(str, geometry)))
@pytest.mark.parametrize("operation", OPERATIONS)
def test_operation_is_exact(operation, geometry, dtype):
    assert_exact(getattr(Factory(*geometry), operation)(), dtype)
