"""`python -m benchmarks.gpu --output DIR`: build for the card that is here, test, sanitize and measure.

Writes DIR/<card>.json, in the format of benchmarks/results, and DIR/gpu.log, both while it runs: what was found until
then is kept if it is cut off, and a second call takes the measurements up where the first left off. Works offline.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import torch

from densenet_efficient.kernels import gpu

from . import results as results_file

PYTHON = sys.executable
TESTS = ("tests/test_cuda_kernels.py", "tests/triton_operations.py", "tests/test_gpu_training.py")
SANITIZER = "compute-sanitizer"
KERNELS, MEASUREMENTS, LARGE, PARITY = "kernels", "measurements", "large", "parity"
STAGES = ("build", "backend", "tests", "memcheck", "racecheck", KERNELS, MEASUREMENTS, LARGE, PARITY)
PROCESSES = 12  # of the tests; each has a context on the card, and compiles Triton kernels on a core
RESTARTS = 3  # of the measuring process, where a failure has left the GPU unusable for it


@dataclass(frozen=True)
class Stage:
    """A command, and the seconds after which it is stopped."""

    name: str
    command: Sequence[str]
    seconds: float
    variables: dict[str, str] = field(default_factory=dict)


def fixed_stages(architecture: str, path: Path) -> list[Stage]:
    """All but the measurements, which take the time that is left."""
    install = [PYTHON, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index", "--editable", "."]
    jobs = str(len(os.sched_getaffinity(0)))
    pytest = [PYTHON, "-m", "pytest", "-rf", "--tb=short"]
    parallel = [*pytest, "--numprocesses", str(PROCESSES), "-m", "not large"]
    one_thread = {"OMP_NUM_THREADS": "1"}  # of each process: all threads of all took twice as long
    watched = [PYTHON, "tests/sanitized_operations.py"]
    # Memory of its own for each tensor: within the allocator's large blocks, no access is out of bounds.
    uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return [
        Stage("build", install, 150, {"TORCH_CUDA_ARCH_LIST": architecture, "MAX_JOBS": jobs}),
        Stage("backend", [PYTHON, "-c", REQUIRE_CUDA], 30),
        Stage("tests", [*parallel, "-k", "not shim", *TESTS], 120, one_thread),
        *(
            Stage(tool, [SANITIZER, "--tool", tool, "--error-exitcode", "1", *watched], 45, uncached)
            for tool in ("memcheck", "racecheck")
        ),
        Stage(KERNELS, [PYTHON, "-m", "benchmarks.gpu_kernels", str(path)], 45),
        Stage(LARGE, [*pytest, "-k", "not shim", "-m", "large", *TESTS], 30),
        Stage(
            PARITY, [*parallel, "-k", "(cuda or triton) and not reference", "tests/test_exactness.py"], 90, one_thread
        ),
    ]


REQUIRE_CUDA = """
import sys, torch
from densenet_efficient.kernels import cuda
sys.exit(cuda.obstacle(torch.device("cuda", 0)))
"""


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("runs", "gpu"), metavar="DIR")
    parser.add_argument("--minutes", type=float, default=8.7, help="all of it ends by then")
    parser.add_argument("--only", nargs="+", metavar="STAGE", help=f"of: {', '.join(STAGES)}; default: all")
    options = parser.parse_args(arguments)
    if options.only and not set(options.only) <= set(STAGES):
        parser.error(f"--only takes {', '.join(STAGES)}; got {', '.join(options.only)}")
    device = torch.device("cuda", 0)
    reason = gpu.unsupported_card(device)
    if reason is not None:
        sys.exit(f"benchmarks.gpu needs a GPU of compute capability 8.0 or newer: {reason}")
    deadline = time.monotonic() + options.minutes * 60
    folder = options.output.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    header = results_file.describe_machine("cuda")
    path = folder / f"{header['machine']}.json"
    architecture = ".".join(map(str, torch.cuda.get_device_capability(device)))
    stages = {stage.name: stage for stage in fixed_stages(architecture, path)}
    todo = [name for name in STAGES if not options.only or name in options.only]
    outcomes: dict[str, str] = {}
    with (folder / "gpu.log").open("ab") as log:
        for name in todo:
            if name == MEASUREMENTS:
                later = todo[todo.index(name) + 1 :]
                outcomes[name] = measure(path, log, deadline - sum(stages[after].seconds for after in later))
            else:
                outcomes[name] = run(stages[name], log, deadline)
            keep(path, outcomes)
    if outcomes.get(MEASUREMENTS, "").startswith("stopped"):
        del outcomes[MEASUREMENTS]  # there is always more to measure than time
    failed = [name for name, outcome in outcomes.items() if outcome != "passed"]
    failed += [f"{row['kind']} of {row['implementation']}" for row in json.loads(path.read_text()).get("failed", [])]
    print(f"wrote {path} and {log.name}", flush=True)
    if failed:
        sys.exit(f"not passed: {', '.join(failed)}; see {log.name}")


def exit_when_terminated() -> None:
    """Lets a SIGTERM end this process as an exit does, so that the running stage does not keep the card."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def keep(path: Path, outcomes: dict[str, str]) -> None:
    """Write the outcomes into the results file."""
    results = results_file.load(path, results_file.describe_machine("cuda"))
    results_file.save(path, {**results, "checks": results.get("checks", {}) | outcomes})


def measure(path: Path, log: IO[bytes], deadline: float) -> str:
    """Measure until all is measured or the time is over, in a process of its own, renewed where its GPU is lost."""
    command = [PYTHON, "-m", "benchmarks.gpu_rows", str(path)]
    for attempt in range(1 + RESTARTS):
        outcome = run(Stage(f"measurements {attempt + 1}", command, float("inf")), log, deadline)
        if not outcome.startswith("failed"):
            break
    return outcome


def run(stage: Stage, log: IO[bytes], deadline: float) -> str:
    """ "passed", or in a few words why not; all output goes to the log."""
    seconds = min(stage.seconds, deadline - time.monotonic())
    if shutil.which(stage.command[0]) is None:
        outcome = f"{stage.command[0]} was not found"
    elif seconds <= 0:
        outcome = "no time was left"
    else:
        outcome = _run(stage, log, seconds)
    print(f"{stage.name}: {outcome}", flush=True)
    return outcome


def _run(stage: Stage, log: IO[bytes], seconds: float) -> str:
    started = time.monotonic()
    process = subprocess.Popen(
        list(stage.command),
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        env=os.environ | {"PYTHONPATH": str(results_file.ROOT), "PYTHONUNBUFFERED": "1"} | stage.variables,
        cwd=results_file.ROOT,
        start_new_session=True,
    )
    try:
        status = process.wait(seconds)
    except subprocess.TimeoutExpired:
        return f"stopped after {time.monotonic() - started:.0f} s"
    finally:  # also where this process is interrupted
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return "passed" if status == 0 else f"failed with status {status}"


if __name__ == "__main__":
    exit_when_terminated()
    main(sys.argv[1:])
