"""A process of several that dies in the middle of a step: the others end with an error, and the run continues."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.own_process
PROCESSES, NOBODY, LONGEST = 3, -1, 60  # seconds until the others have ended
SCRIPT = Path(__file__).with_name("killed_worker.py")


def start(folder, victim):
    folder.mkdir(exist_ok=True)
    return [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(rank), str(folder), str(victim)],
            cwd=SCRIPT.parents[2],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(PROCESSES)
    ]


def finish(folder):
    for process in start(folder, NOBODY):
        _, error = process.communicate(timeout=120)
        assert process.returncode == 0, error
    return [torch.load(folder / f"end-{rank}.pt") for rank in range(PROCESSES)]


def test_a_worker_dies_within_a_step(record, tmp_path):
    whole = finish(tmp_path / "whole")
    victim, folder = 1, tmp_path / "killed"
    processes = start(folder, victim)
    assert processes[victim].wait(120) == -signal.SIGKILL
    deadline = time.monotonic() + LONGEST
    for rank, process in enumerate(processes):
        if rank == victim:
            continue
        _, error = process.communicate(timeout=deadline - time.monotonic())
        assert process.returncode > 0
        assert "RuntimeError" in error or "DistBackendError" in error, error
        assert "onnection" in error or "gloo" in error, error
    seconds = time.monotonic() - (deadline - LONGEST)
    assert torch.load(folder / "last.pt")["step"] == 3
    for found, expected in zip(finish(folder), whole, strict=True):
        for name, value in expected.items():  # after a start DDP sums the processes' gradients in another order
            torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12)
    record(seconds_until_all_workers_ended=round(seconds, 1))
