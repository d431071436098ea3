"""Two processes that train together: who reads which files before, and how both leave a validation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as multiprocessing
from training_cases import assert_same_bits, make_images, weights
from training_together import STRATEGIES, work

from densenet_efficient.training.checkpoint import read_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two gloo processes left. Of 13 images to validate by the first has a batch of three more than the second."""
    folder = tmp_path_factory.mktemp("together")
    make_images(folder / "images" / "train", per_class=6)
    make_images(folder / "images" / "val", per_class=7)
    (folder / "images" / "val" / "dark" / "6.png").unlink()
    make_images(folder / "damaged", per_class=10)
    for name in ("bright/3.png", "dark/4.png"):
        (folder / "damaged" / name).write_bytes(b"")
    multiprocessing.spawn(work, (folder,), nprocs=2)
    return folder


@pytest.fixture(scope="module")
def results(folder: Path) -> list[dict[str, Any]]:
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


def test_each_process_reads_its_share_of_the_files(results: list[dict[str, Any]]) -> None:
    """On machines of their own each reads all."""
    shares = [result["shares"] for result in results]
    paths = ["0bad.png", "1.png", "2.png", "3bad.png", "4.png", "5.png", "6bad.png"]
    bad = [path for path in paths if "bad" in path]
    assert [sorted(share["asked"][:-7]) for share in shares] == [paths[0::2], paths[1::2]]
    assert [sorted(share["asked"][-7:]) for share in shares] == [paths, paths]
    assert all(list(share[name]) == bad for share in shares for name in ("found", "alone"))


def test_no_process_waits_for_one_that_fails_as_it_reads(results: list[dict[str, Any]]) -> None:
    first, second = (result["shares"]["failure"] for result in results)
    assert second == "TypeError('no such codec')"
    assert "process 1 failed as it read the images of --data: TypeError: no such codec" in first


def test_damaged_files_are_named_by_every_process(folder: Path, results: list[dict[str, Any]]) -> None:
    """Before the training, for which each has read half of the files."""
    assert results[0]["refused"]["error"] == results[1]["refused"]["error"]
    error = results[0]["refused"]["error"]
    assert "error: 2 of 20 files cannot be read as images: " in error
    assert all(f"{folder}/damaged/{name}: " in error for name in ("bright/3.png", "dark/4.png"))
    assert [len(result["refused"]["asked"]) for result in results] == [10, 10]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_validation_is_left_by_all_and_done_again(strategy: str, folder: Path, results: list[dict[str, Any]]) -> None:
    """Unless one has no batch left in which to ask the others: then it is ended, with its epoch."""
    assert [result[strategy]["stopped"] for result in results] == [[0], [0]]
    assert [result[strategy]["ended"] for result in results] == [[0, 1, 2], [0, 1]]
    assert len(read_checkpoint(folder / strategy / "ended" / "last.ckpt")["callbacks"]["History"]["records"]) == 1
    for name in ("last.ckpt", "best.ckpt"):
        whole, stopped = (folder / strategy / run for run in ("whole", "stopped"))
        assert_same_bits(weights(stopped, name), weights(whole, name))
