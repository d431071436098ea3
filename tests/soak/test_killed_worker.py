"""A process of several that dies in the middle of a step: the others end with an error, and the run continues."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from training_cases import fit_arguments, make_images

from densenet_efficient.training.checkpoint import LAST, read_checkpoint

PROCESSES, NOBODY, LONGEST = 3, -1, 120  # seconds until the others have ended
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


def progress_of(run):
    """The steps taken and the epoch, of the last checkpoint."""
    content = read_checkpoint(run / LAST) if (run / LAST).exists() else {"global_step": 0, "epoch": 0}
    return content["global_step"], content["epoch"]


def second_process(first):
    """What Lightning has started beside the first."""
    for child in Path(f"/proc/{first}/task/{first}/children").read_text().split():
        if b"LOCAL_RANK=1" in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            return int(child)
    raise AssertionError("there is no second process")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the second process is found in Linux's way")
def test_a_process_of_fit_dies(tmp_path):
    """Each of two, one after the other: what is left says so, and the same command goes on."""
    run = tmp_path / "run"
    options = ("--trainer.devices", "2", "--trainer.strategy", "ddp", "--save_every_n_steps", "1")
    arguments = fit_arguments(make_images(tmp_path / "images"), run, *options, "--ckpt_path", "last")
    command = [sys.executable, "-m", "densenet_efficient.cli", *arguments, "--trainer.max_epochs"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    steps = epoch = 0
    for victim in (0, 1):
        process = subprocess.Popen(
            [*command, "1000"], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        while progress_of(run)[0] <= steps:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.1)
        os.kill(second_process(process.pid) if victim else process.pid, signal.SIGKILL)
        _, error = process.communicate(timeout=LONGEST)  # both have ended then, for they share the pipe
        assert process.returncode != 0
        assert "another process of this training has ended" in error or "terminated with code -9" in error, error
        steps, epoch = progress_of(run)
    subprocess.run([*command, str(epoch + 2)], env=environment, capture_output=True, check=True)
    assert progress_of(run)[0] > steps
