"""The doctor passes here, and names what is wrong where something is."""

import errno
import io
import json
import os

import pytest
import torch
from cases import needs_native
from rich.console import Console

from densenet_efficient import cli, doctor, kernels
from densenet_efficient.doctor import Performance

HEALTHY = Performance("a network", {"naive": 2.0, "none": 1.0, "bottleneck": 1.0}, {"naive": 100.0, "bottleneck": 8.0})

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def without_measuring(monkeypatch):
    """Memory and time as of a machine on which all is well: measuring them takes half a minute."""
    monkeypatch.setattr(doctor, "measure_performance", lambda: HEALTHY)


@needs_native
def test_this_installation_is_well(tmp_path, capsys, without_measuring, monkeypatch):
    monkeypatch.setenv(kernels.BACKEND_VARIABLE, "reference")
    assert cli.main(["doctor", "--json", str(tmp_path / "doctor.json")]) == 0
    assert "All is well." in capsys.readouterr().out
    assert kernels.backend_name("cpu") == "reference"  # as it was
    found = json.loads((tmp_path / "doctor.json").read_text())
    assert found["problems"] == []
    tried = {(row["backend"], row["dtype"], row["checkpointing"]) for row in found["parity"]}
    served = [backend["name"] for backend in found["backends"] if backend["obstacle"] is None]
    assert {"reference", "cpu"} <= set(served)
    levels = ("none", "bottleneck")
    assert tried == {(name, dtype, level) for name in served for dtype in doctor.DTYPES for level in levels}
    if not torch.cuda.is_available():
        obstacles = {backend["name"]: backend["obstacle"] for backend in found["backends"]}
        assert "sees no GPU" in obstacles["cuda"]


def sabotaged(monkeypatch, capsys, name, function):
    """What the doctor says of a reference backend with another ``name``."""
    monkeypatch.setattr(kernels.reference, name, function)
    assert cli.main(["doctor"]) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "Something is wrong." in out
    return out


def test_a_wrong_result_is_named(monkeypatch, capsys, without_measuring):
    right = kernels.reference.project_gradient

    def wrong(grad, *arguments):
        right(grad, *arguments)
        grad.mul_(1 + 1e-6)

    out = sabotaged(monkeypatch, capsys, "project_gradient", wrong)
    assert "wrong: backend reference, float64, checkpointing none: gradients differ by" in out
    assert "outputs differ" not in out
    assert "wrong: backend cpu" not in out


def test_a_failing_operation_is_named(monkeypatch, capsys, without_measuring):
    def failing(*arguments):
        raise RuntimeError("no such instruction")

    out = sabotaged(monkeypatch, capsys, "bn_relu_conv1x1", failing)
    assert "backend reference, bfloat16, checkpointing bottleneck: RuntimeError: no such instruction" in out


def test_a_missing_backend_is_named(monkeypatch, without_measuring):
    monkeypatch.setattr(kernels.cpu, "obstacle", lambda: "it was not built. Remedy: build it")
    text = io.StringIO()
    assert doctor.examine(console=Console(file=text)) == 1
    assert "wrong: backend cpu: it was not built. Remedy: build it" in text.getvalue()


def test_a_missing_gradient_is_an_infinite_error():
    truth = {name: torch.ones(2) for name in ("outputs", "gradients a", "gradients b", "buffers")}
    results = {name: value for name, value in truth.items() if name != "gradients b"}
    assert doctor._errors(results, truth) == {"outputs": 0.0, "gradients": float("inf"), "buffers": 0.0}


def test_a_result_that_is_no_number_is_named():
    parity = doctor.Parity("cpu", "float32", "none", {"outputs": float("nan")}, {"outputs": 1e-6})
    assert len(parity.problems) == 1


def test_memory_without_gain_is_named():
    problems = Performance("a network", {"naive": 1.0}, {"naive": 10.0, "bottleneck": 12.0}).problems
    assert problems == ["memory: bottleneck takes 12.0 MiB per image, the naive model 10.0"]


def test_memory_and_time_are_measured(monkeypatch):
    monkeypatch.setattr(doctor, "TIMED", "densenet-bc-40-12")
    monkeypatch.setattr(doctor, "TIMED_SHAPE", (3, 32, 32))
    monkeypatch.setattr(doctor, "MEMORY_BATCHES", (16, 144))
    performance = doctor.measure_performance()
    assert set(performance.step_ms) == {"naive", "none", "bottleneck"}
    assert performance.problems == []
    assert performance.mib_per_image["naive"] > 2 * performance.mib_per_image["bottleneck"]


def test_a_missing_folder_is_refused_at_once(tmp_path, capsys):
    assert cli.main(["doctor", "--json", str(tmp_path / "none" / "doctor.json")]) == 2
    assert "its folder does not exist" in capsys.readouterr().err


def test_a_full_disk_leaves_an_earlier_examination(tmp_path, capsys, without_measuring, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "doctor.json").write_text("earlier")
    monkeypatch.setattr(os, "fsync", full)
    assert cli.main(["doctor", "--json", str(tmp_path / "doctor.json")]) == 2
    assert f"error: {tmp_path / 'doctor.json'}: " in capsys.readouterr().err
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("doctor.json", "earlier")]
