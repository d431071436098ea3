"""Memory that runs out within a training step: an exception, nothing half done, and the next step to the same bits."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from cases import needs_native
from torch.utils import cpp_extension

FOLDER = Path(__file__).resolve().parent
SHORT_STRIDE = 41  # one in so many allocations fails
MOST_LEAKED = 2**16  # bytes, over all failures of one model: less than one of its storages


@needs_native
@pytest.mark.own_process
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a library is preloaded in Linux's way")
def test_each_allocation_may_fail(in_full, record, tmp_path):
    stride = 1 if in_full else SHORT_STRIDE
    library = tmp_path / "failing_allocations.so"
    compiler = shlex.split(cpp_extension.get_cxx_compiler())
    source = str(FOLDER / "failing_allocations.cpp")
    subprocess.run([*compiler, "-std=c++20", "-shared", "-fPIC", "-O1", source, "-o", str(library), "-ldl"], check=True)
    script = [sys.executable, str(FOLDER / "allocation_failures.py"), str(library), str(stride)]
    environment = os.environ | {"LD_PRELOAD": str(library), "PYTHONPATH": str(FOLDER.parents[1])}
    environment["OMP_WAIT_POLICY"] = "passive"  # other parts of the suite run beside this one
    process = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=1200)
    assert process.returncode == 0, process.stderr
    found = json.loads(process.stdout.splitlines()[-1])
    assert found["failures"] >= 1200 // stride
    assert found["leaked"] <= MOST_LEAKED
    record(allocation_failures=found["failures"], leaked_bytes=found["leaked"])
