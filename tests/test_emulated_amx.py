"""The kernels for AMX on a CPU that lacks it: their tests again, with tiles in AVX-512."""

import sys

import emulated_amx.build
import pytest
from cases import needs_native
from processes import ROOT, run, run_tests

KERNELS = ["tests/test_kernels.py", "tests/test_inference_stem.py", "-m", "each_capability"]
LAYERS = ["tests/test_native_layers.py", "tests/test_inference.py"]


@needs_native
def test_kernels_for_amx(monkeypatch):
    obstacle = emulated_amx.build.obstacle()
    if obstacle is not None:
        pytest.skip(obstacle)
    monkeypatch.chdir(ROOT)
    environment = emulated_amx.build.environment() | {"MALLOC_PERTURB_": "128"}
    folder = environment["PYTHONPATH"]
    code = "from densenet_efficient import _C; print(_C.cpu_capability())"
    assert run([sys.executable, "-c", code], env=environment, cwd=folder).strip() == "amx"
    for tests in (KERNELS, LAYERS):
        report = run_tests(["-o", f"pythonpath={folder}", *tests], environment)
        assert "skipped" not in report, report
