"""FSDP over two processes: one process's training of the whole batch, with half of the parameters in each."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as multiprocessing
from sharded_training import COMMON, DDP, PARTS, WITHOUT_CHANCE, evaluate_between_steps, work
from synchronised_training import CONFIG, train_whole
from torch import Tensor
from training_cases import assert_same_bits, fit, fit_arguments, make_images, weights

from densenet_efficient.cli import main
from densenet_efficient.reference import NaiveDenseNet


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two gloo processes left."""
    folder = tmp_path_factory.mktemp("sharded")
    make_images(folder / "images", per_class=15)
    multiprocessing.spawn(work, (folder,), nprocs=2)
    return folder


def assert_nearly_equal(state: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """In float32, up to the order of sums and the ReLUs that it turns over."""
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        assert (state[name] - value.double()).norm() <= 1e-3 * value.double().norm() + 1e-5, name


@pytest.mark.parametrize("parts", PARTS)
def test_a_sharded_model_trains_as_a_whole_one(parts: str, results: Path) -> None:
    """Two steps in float64; unequal shares of the images where the norms are synchronised."""
    expected = train_whole(NaiveDenseNet)
    parameters = sum(parameter.numel() for parameter in NaiveDenseNet(**CONFIG).parameters())
    for rank in (0, 1):
        result = torch.load(results / f"{parts}-{rank}.pt")
        assert result["state"].keys() == expected.keys()
        for name, value in result["state"].items():
            torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
        assert 0.4 < result["share"] / parameters < 0.6
        assert len(result["said"]) == (2 if parts == "layers" else 0)  # once for each block


def test_an_evaluation_between_steps_sees_the_new_weights(results: Path) -> None:
    torch.manual_seed(0)
    expected = evaluate_between_steps(NaiveDenseNet(**CONFIG).double())
    for rank in (0, 1):
        for logits, value in zip(torch.load(results / f"logits-{rank}.pt"), expected, strict=True):
            torch.testing.assert_close(logits, value, rtol=1e-9, atol=1e-9)


def test_fit_by_fsdp_is_fit_by_ddp(results: Path) -> None:
    """The head alone, then everything."""
    assert_nearly_equal(weights(results / "fsdp"), weights(results / "ddp"))
    assert (results / "fsdp" / "report.html").exists()


def test_torchrun_starts_the_processes(results: Path, tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    arguments = fit_arguments(results / "images", tmp_path, *COMMON, *DDP)
    subprocess.run([*torchrun, "densenet_efficient.cli", *arguments], check=True)
    assert_nearly_equal(weights(tmp_path), weights(results / "ddp"))


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_synchronised_norms_train_as_one_process_with_the_whole_batch(
    strategy: str, results: Path, tmp_path: Path
) -> None:
    assert fit(results / "images", tmp_path, *WITHOUT_CHANCE, "--data.batch_size", "8") == 0
    assert_nearly_equal(weights(results / f"synchronised-{strategy}"), weights(tmp_path))


def test_a_sharded_run_is_continued_with_the_same_bits(results: Path) -> None:
    assert_same_bits(weights(results / "stopped"), weights(results / "fsdp"))


def test_an_average_of_the_weights_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = fit_arguments(make_images(tmp_path / "images"), tmp_path / "run")
    assert main([*arguments, "--trainer.strategy", "fsdp", "--ema_decay", "0.9"]) == 2
    assert "--ema_decay keeps all weights in each process" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
