"""What each of two processes of a training does for its tests; started by torch.multiprocessing."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from contextlib import redirect_stderr
from datetime import timedelta
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from pytorch_lightning import Trainer
from training_cases import fit

from densenet_efficient.training.data import FolderData
from densenet_efficient.training.history import History
from densenet_efficient.training.shared_check import find_unreadable_together

STRATEGIES = ("ddp", "fsdp")
TOGETHER = ("--trainer.devices", "2", "--trainer.max_epochs", "2", "--data.batch_size", "3", "--trainer.strategy")


def check_shares(paths: Sequence[str], rank: int) -> dict[str, Any]:
    """What was read here, and found by both; and what is said where process 1 fails at all it reads."""
    asked: list[str] = []

    def read(path: str) -> None:
        asked.append(path)
        if "bad" in path:
            raise ValueError("expected an undamaged image")

    def fail(path: str) -> None:
        if rank == 1:
            raise TypeError("no such codec")

    found = find_unreadable_together(paths, read, rank, 2)
    with pytest.raises((TypeError, RuntimeError)) as failure:
        find_unreadable_together(paths, fail, rank, 2)
    alone = find_unreadable_together(paths, read, 0, 1)  # as on a machine of its own
    return {"asked": asked, "found": found, "alone": alone, "failure": repr(failure.value)}


def refuse(images: Path, output: Path) -> dict[str, Any]:
    """The error of a fit with damaged images, and the names of the files that this process has read."""
    asked: list[str] = []
    original = FolderData.read_source

    def read_source(self: FolderData, source: Any) -> Any:
        asked.append(Path(source).name)
        return original(self, source)

    with pytest.MonkeyPatch.context() as patch, redirect_stderr(StringIO()) as said:
        patch.setattr(FolderData, "read_source", read_source)
        assert fit(images, output, *TOGETHER, "ddp") == 2
    return {"asked": asked, "error": said.getvalue().splitlines()[-1]}


def stop_in_a_validation(images: Path, output: Path, rank: int, strategy: str) -> dict[str, list[int]]:
    """Runs that one process is told to stop; return the batches of the first validation that were seen.

    Process 0 has a batch more than process 1, which is told in the first batch; then in another run process 0 in the
    last that both have.
    """
    seen: dict[str, list[int]] = {}
    for name, told, batch in (("stopped", 1, 0), ("ended", 0, 1)):
        batches = seen[name] = []

        def on_validation_batch_end(
            self: History, trainer: Trainer, *given: Any, told: int = told, at: int = batch, seen: list[int] = batches
        ) -> None:
            if not trainer.sanity_checking:
                seen.append(given[3])
                if rank == told and given[3] == at:
                    signal.raise_signal(signal.SIGTERM)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(History, "on_validation_batch_end", on_validation_batch_end, raising=False)
            assert fit(images, output / name, *TOGETHER, strategy) == 128 + signal.SIGTERM
    assert fit(images, output / "stopped", *TOGETHER, strategy, "--ckpt_path", "last") == 0
    assert fit(images, output / "whole", *TOGETHER, strategy) == 0
    return seen


def work(rank: int, folder: Path) -> None:
    """Results go into `folder`, of which `images` and `damaged` are the data."""
    torch.set_num_threads(1)
    rendezvous = f"file://{folder / 'rendezvous'}"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2, timeout=timedelta(seconds=120))
    results = {"shares": check_shares([f"{index}{'bad' * (index % 3 == 0)}.png" for index in range(7)], rank)}
    # As torchrun sets them; the group that Lightning would make is there already.
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "NODE_RANK": "0"}
    results["refused"] = refuse(folder / "damaged", folder / "refused")
    for strategy in STRATEGIES:
        results[strategy] = stop_in_a_validation(folder / "images", folder / strategy, rank, strategy)
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()
