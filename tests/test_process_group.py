"""How processes leave a training together."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from densenet_efficient.training import process_group
from densenet_efficient.training.cli import run
from densenet_efficient.training.interruption import is_of_a_lost_process

EXCHANGING = Path(__file__).parent / "exchanging.py"


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="processes are bound to a core on Linux alone")
@pytest.mark.parametrize("pair", range(3))
def test_processes_end_after_an_exchange(pair: int, tmp_path: Path) -> None:
    """On one core a quarter of them is aborted, unless they wait for the threads that hold what was exchanged."""
    core = min(os.sched_getaffinity(0))
    arguments = [sys.executable, EXCHANGING, tmp_path / "rendezvous"]
    processes = [
        subprocess.Popen([*arguments, str(rank)], preexec_fn=lambda: os.sched_setaffinity(0, {core}))
        for rank in range(2)
    ]
    assert [process.wait(60) for process in processes] == [0, 0]


@pytest.mark.parametrize("together", [True, False])
def test_a_command_waits_before_its_process_ends(
    together: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that fails; alone it does not wait."""
    waits: list[float] = []
    monkeypatch.setattr(process_group.time, "sleep", waits.append)
    if together:
        dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match="expected one subfolder of images per class"):
            run("check-data", ["--data", str(tmp_path)])
    finally:
        if together:
            dist.destroy_process_group()
    assert waits == [process_group.SECONDS_TO_LET_GO] * together


@pytest.mark.parametrize(
    ("error", "is_lost"),
    [
        (dist.DistBackendError("NCCL communicator was aborted on rank 1."), True),
        (RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied (4x9 and 8x2)"), False),
        (RuntimeError("the backend is gloo"), False),
    ],
    ids=["of NCCL", "of gloo", "another", "of another that names gloo"],
)
def test_errors_of_a_process_that_has_lost_another(error: RuntimeError, is_lost: bool) -> None:
    assert is_of_a_lost_process(error) == is_lost
