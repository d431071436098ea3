"""A measurement in a fresh process, asked and answered in JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from ..results import ROOT


def run_in_fresh_process(module: str, request: Mapping[str, Any]) -> Any:
    """What ``python -m module`` prints last, given the request as its argument.

    Raises:
        RuntimeError: it failed, with the last line of its errors; MemoryError if it was memory that it lacked.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    command = [sys.executable, "-m", module, json.dumps(request)]
    process = subprocess.run(command, capture_output=True, text=True, env=environment)
    if process.returncode == 0:
        return json.loads(process.stdout.splitlines()[-1])
    reason = (process.stderr.strip().splitlines() or [f"exit status {process.returncode}"])[-1]
    kind = MemoryError if any(sign in process.stderr for sign in OUT_OF_MEMORY) else RuntimeError
    raise kind(f"{module} failed in a fresh process: {reason}")


# torch's own allocator, Python's, C++'s, and what oneDNN says where it cannot map memory.
OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "MemoryError", "bad_alloc", "could not create a")
