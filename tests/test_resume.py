"""Interrupted runs: what is left of them, and that a continued run ends with the bits of one never interrupted."""

from __future__ import annotations

import errno
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from training_cases import assert_same_bits, fails, fit, fit_arguments, make_images, stopping_at, weights

from densenet_efficient.training.checkpoint import AtomicCheckpointIO, is_whole, last_whole, read_checkpoint
from densenet_efficient.training.finish import CollectOutputs
from densenet_efficient.training.interruption import SaveLast
from densenet_efficient.training.signals import SIGNALS, end_with_the_run

pytestmark = pytest.mark.own_process
AVERAGED = ("--ema_decay", "0.9")


class Killed(BaseException):
    """As sudden as a kill: nothing may catch it."""


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"), per_class=12)


@pytest.fixture(scope="module")
def whole(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupts, 3 epochs of 5 batches."""
    output = tmp_path_factory.mktemp("whole")
    assert fit(images, output, *AVERAGED) == 0
    return output


def fit_until_killed(monkeypatch: pytest.MonkeyPatch, batch: int, images: Path, output: Path) -> None:
    """A run that dies after the batch of this number, without a chance to save."""

    def kill(trainer: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        stopping_at(patch, batch, kill)
        with pytest.raises(Killed):
            fit(images, output, *AVERAGED)


def test_two_runs_give_the_same_bits(images: Path, whole: Path, tmp_path: Path) -> None:
    assert fit(images, tmp_path, *AVERAGED, "--data.num_workers", "1") == 0
    assert_same_bits(weights(tmp_path), weights(whole))


def test_a_killed_run_continues_from_its_last_epoch(
    images: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit_until_killed(monkeypatch, 8, images, tmp_path)
    assert read_checkpoint(tmp_path / "last.ckpt")["global_step"] == 5
    assert fit(images, tmp_path, *AVERAGED, "--ckpt_path", "last") == 0
    assert_same_bits(weights(tmp_path), weights(whole))
    assert_same_bits(weights(tmp_path, "best.ckpt"), weights(whole, "best.ckpt"))


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_run_continues_within_an_epoch(
    workers: str, images: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopping_at(monkeypatch, 8, lambda trainer: signal.raise_signal(signal.SIGTERM))
    assert fit(images, tmp_path, *AVERAGED) == 128 + signal.SIGTERM
    monkeypatch.undo()
    assert read_checkpoint(tmp_path / "last.ckpt")["global_step"] == 8
    assert fit(images, tmp_path, *AVERAGED, "--ckpt_path", "last", "--data.num_workers", workers) == 0
    assert_same_bits(weights(tmp_path), weights(whole))
    history = [read_checkpoint(path / "last.ckpt")["callbacks"]["History"]["records"] for path in (tmp_path, whole)]
    assert [record["epoch"] for record in history[0]] == [1, 2, 3]
    assert history[0][-1]["val_loss"] == history[1][-1]["val_loss"]


def test_accumulation_and_steps_between_epochs(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM in the middle of an accumulated step waits for its end; so do the checkpoints within an epoch."""
    options = ("--trainer.accumulate_grad_batches", "2", "--save_every_n_steps", "1")
    assert fit(images, tmp_path / "whole", *options) == 0
    stopping_at(monkeypatch, 6, lambda trainer: signal.raise_signal(signal.SIGTERM))
    assert fit(images, tmp_path / "stopped", *options) == 128 + signal.SIGTERM
    monkeypatch.undo()
    assert read_checkpoint(tmp_path / "stopped" / "last.ckpt")["global_step"] == 4  # 3 per epoch: batches 2, 4, 5
    assert fit(images, tmp_path / "stopped", *options, "--ckpt_path", "last") == 0
    assert_same_bits(weights(tmp_path / "stopped"), weights(tmp_path / "whole"))


def files(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("--model.network", "densenet-bc-100-12"),
            "of another network than was given (block_config [6, 6, 6], not [16",
        ),
        (
            ("--data.channels", "1"),
            "(in_channels 3, not 1); give the --model.network and --data.channels it was trained",
        ),
        (
            ("--model.optimizer", "sgd"),
            "a checkpoint of --model.optimizer adamw, which cannot go on with sgd; give adamw",
        ),
        (("--model.optimizer", "adam"), "a checkpoint of --model.optimizer adamw, which cannot go on with adam"),
    ],
)
def test_a_continuation_that_is_refused_leaves_the_run_as_it_was(
    options: tuple[str, str], message: str, images: Path, whole: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = files(whole)
    last = ("--ckpt_path", "last", "--trainer.max_epochs", "4")
    assert fit(images, whole, *AVERAGED, *last, *options) == 2
    error = capfd.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: {whole / 'last.ckpt'}: ") and message in error
    assert files(whole) == before
    if "optimizer" not in options[0]:
        error = fails(["test", "--config", str(whole / "config.yaml"), "--ckpt_path", "best", *options], capfd)
        assert error.startswith(f"error: {whole / 'best.ckpt'}: ") and message in error


def test_a_run_is_replaced_only_by_one_that_trains(
    images: Path, whole: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run, damaged = shutil.copytree(whole, tmp_path / "run"), shutil.copytree(images, tmp_path / "images")
    (damaged / "dark" / "0.png").write_bytes(b"")
    before = files(run)
    assert fit(damaged, run, "--overwrite", "true") == 2
    assert "dark/0.png: " in capfd.readouterr().err
    assert files(run) == before
    assert fit(images, run, "--overwrite", "true", "--trainer.max_epochs", "1") == 0
    assert files(run).keys() == {"best.ckpt", "last.ckpt", "config.yaml"}
    assert read_checkpoint(run / "last.ckpt")["global_step"] == 5


def test_a_run_that_goes_on_is_not_replaced(images: Path, whole: Path, tmp_path: Path) -> None:
    run = shutil.copytree(whole, tmp_path / "run")
    step = read_checkpoint(run / "last.ckpt")["global_step"]
    more = ("--overwrite", "true", "--ckpt_path", "last", "--trainer.max_epochs", "4")
    assert fit(images, run, *AVERAGED, *more) == 0
    assert read_checkpoint(run / "previous.ckpt")["global_step"] == step


def test_sigterm_after_the_last_batch_of_an_epoch(
    images: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopping_at(monkeypatch, 5, lambda trainer: signal.raise_signal(signal.SIGTERM))
    assert fit(images, tmp_path, *AVERAGED) == 128 + signal.SIGTERM
    monkeypatch.undo()
    assert len(read_checkpoint(tmp_path / "last.ckpt")["callbacks"]["History"]["records"]) == 1
    assert fit(images, tmp_path, *AVERAGED, "--ckpt_path", "last") == 0
    assert_same_bits(weights(tmp_path), weights(whole))


def test_sigterm_while_the_trained_model_is_evaluated(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run is not taken for a finished one; the same command then writes its report."""
    options = ("--trainer.max_epochs", "1", "--report", "true")
    with monkeypatch.context() as patch:
        patch.setattr(CollectOutputs, "on_test_batch_end", lambda *_: signal.raise_signal(signal.SIGTERM))
        assert fit(images, tmp_path, *options) == 128 + signal.SIGTERM
    assert not (tmp_path / "report.html").exists()
    assert fit(images, tmp_path, *options, "--ckpt_path", "last") == 0
    assert (tmp_path / "report.html").exists()


def test_signals_end_what_follows_a_training(images: Path, tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    assert fit(images, tmp_path, "--trainer.max_epochs", "1", "--report", "true") == 0
    assert [signal.getsignal(number) for number in SIGNALS] == before


@pytest.mark.parametrize("frozen", [("--model.head_epochs", "1"), ("--model.frozen_batch_norm", "true")])
def test_what_is_frozen_stays_so_in_an_epoch_that_is_continued(
    frozen: tuple[str, str], images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = (*frozen, "--trainer.max_epochs", "2")
    assert fit(images, tmp_path / "whole", *options) == 0
    stopping_at(monkeypatch, 2, lambda trainer: signal.raise_signal(signal.SIGTERM))
    assert fit(images, tmp_path / "stopped", *options) == 128 + signal.SIGTERM
    monkeypatch.undo()
    assert fit(images, tmp_path / "stopped", *options, "--ckpt_path", "last") == 0
    assert_same_bits(weights(tmp_path / "stopped"), weights(tmp_path / "whole"))


def test_the_scale_of_float16_is_continued(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scale that has grown, since it would begin anew if the checkpoint did not hold it."""
    from torch.amp import GradScaler

    monkeypatch.setattr(GradScaler.__init__, "__defaults__", (*GradScaler.__init__.__defaults__[:4], 3, True))
    options = ("--trainer.precision", "16-mixed", "--trainer.max_epochs", "2")
    assert fit(images, tmp_path / "whole", *options) == 0
    with pytest.MonkeyPatch.context() as patch:
        stopping_at(patch, 7, lambda trainer: signal.raise_signal(signal.SIGTERM))
        assert fit(images, tmp_path / "stopped", *options) == 128 + signal.SIGTERM
    scaler = read_checkpoint(tmp_path / "stopped" / "last.ckpt")["MixedPrecision"]
    assert scaler["scale"] != 2.0**16
    assert fit(images, tmp_path / "stopped", *options, "--ckpt_path", "last") == 0
    assert_same_bits(weights(tmp_path / "stopped"), weights(tmp_path / "whole"))


def test_kill_minus_nine(images: Path, whole: Path, tmp_path: Path) -> None:
    """A process of its own, killed by the system once it has a checkpoint."""
    command = [sys.executable, "-m", "densenet_efficient.cli"]
    process = subprocess.Popen([*command, *fit_arguments(images, tmp_path, *AVERAGED, "--save_every_n_steps", "1")])
    deadline = time.monotonic() + 120
    while not (tmp_path / "last.ckpt").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert fit(images, tmp_path, *AVERAGED, "--ckpt_path", "last") == 0
    assert_same_bits(weights(tmp_path), weights(whole))


def test_a_signal_to_the_whole_group_saves_too(images: Path, whole: Path, tmp_path: Path) -> None:
    """As `timeout` and many a queue send it: to the processes that read images, too, which the step still needs."""
    more = (*AVERAGED, "--data.num_workers", "2", "--save_every_n_steps", "1")
    command = [sys.executable, "-m", "densenet_efficient.cli", *fit_arguments(images, tmp_path, *more)]
    process = subprocess.Popen(command, start_new_session=True)
    while not (tmp_path / "last.ckpt").exists():
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(120) == 128 + signal.SIGTERM
    assert fit(images, tmp_path, *AVERAGED, "--ckpt_path", "last") == 0
    assert_same_bits(weights(tmp_path), weights(whole))


def test_a_checkpoint_every_so_many_steps(tmp_path: Path) -> None:
    saved: list[int] = []
    epoch = SimpleNamespace(batch_progress=SimpleNamespace(is_last_batch=False))
    trainer: Any = SimpleNamespace(world_size=1, accumulate_grad_batches=2, fit_loop=SimpleNamespace(epoch_loop=epoch))
    trainer.save_checkpoint = lambda path: saved.append(trainer.global_step)
    callback = SaveLast(tmp_path / "last.ckpt", every_n_steps=3)
    for batch in range(14):
        trainer.global_step = (batch + 1) // 2
        callback.on_train_batch_end(trainer, None, None, None, batch)  # type: ignore[arg-type]
    assert saved == [3, 6]


def test_ctrl_c_leaves_a_process_that_reads_to_the_run() -> None:
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            end_with_the_run(0)
            os.kill(os.getpid(), signal.SIGINT)
            os.write(writing, b"reading")
            signal.pause()
        finally:
            os._exit(1)
    os.close(writing)
    assert os.read(reading, 7) == b"reading"
    os.close(reading)
    os.kill(pid, signal.SIGTERM)
    assert os.waitpid(pid, 0)[1] == 0


def left_half_written(path: Path) -> Path:
    """What a process leaves that is killed as it writes the file."""
    lines = (
        "import os, pathlib, signal, sys",
        "from densenet_efficient.files import atomic_write",
        "with atomic_write(pathlib.Path(sys.argv[1])) as file:",
        "    file.write(b'half')",
        "    os.kill(os.getpid(), signal.SIGKILL)",
    )
    killed = subprocess.Popen([sys.executable, "-c", "\n".join(lines), str(path)])
    assert killed.wait() == -signal.SIGKILL
    return path.with_name(f".{path.name}.{os.uname().nodename}.{killed.pid}")


def test_what_a_killed_process_left_is_removed_by_the_next(images: Path, whole: Path, tmp_path: Path) -> None:
    """By one that continues the run or replaces it; not by one that is refused."""
    run = shutil.copytree(whole, tmp_path / "run")
    for name, more in (("last.ckpt", ("--ckpt_path", "last")), ("best.ckpt", ("--overwrite", "true"))):
        left = left_half_written(run / name)
        assert left.exists()
        assert fit(images, run, *AVERAGED) == 2
        assert left.exists()
        assert fit(images, run, *AVERAGED, *more, "--trainer.max_epochs", "4") == 0
        assert not list(run.glob(".*"))


def test_a_damaged_checkpoint_gives_way_to_the_previous_one(
    images: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fit_until_killed(monkeypatch, 13, images, tmp_path)
    last = tmp_path / "last.ckpt"
    damaged = bytearray(last.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    last.write_bytes(damaged)
    assert read_checkpoint(tmp_path / "previous.ckpt")["global_step"] == 5
    assert fit(images, tmp_path, *AVERAGED, "--ckpt_path", "last") == 0
    assert f"{last} is damaged: continuing from {tmp_path / 'previous.ckpt'}" in capsys.readouterr().out
    assert_same_bits(weights(tmp_path), weights(whole))


def test_whole_is_what_can_be_read(tmp_path: Path) -> None:
    """After any flip in the headers of the archive, which are checked otherwise by Python than by torch."""
    path = tmp_path / "some.ckpt"
    torch.save({"weight": torch.arange(4.0), "step": 3}, path)
    content, refused = path.read_bytes(), 0
    with zipfile.ZipFile(path) as archive:
        places = {*range(archive.start_dir, len(content))}
        places |= {part.header_offset + byte for part in archive.infolist() for byte in range(60)}
    for place in places:
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        try:
            read_checkpoint(path)
        except RuntimeError:
            refused += 1
            assert not is_whole(path), place
        else:
            assert is_whole(path), place
    assert 0.1 * len(places) < refused < len(places)


def test_a_foreign_checkpoint_does_not_give_way_to_the_previous_one(tmp_path: Path) -> None:
    """It is not damaged, so that its reader refuses it, and says why."""
    torch.save({"step": 2}, tmp_path / "previous.ckpt")
    torch.save({"step": 3, "folder": tmp_path}, tmp_path / "last.ckpt")
    assert last_whole(tmp_path) == tmp_path / "last.ckpt"
    with pytest.raises(pickle.UnpicklingError, match=r"last.ckpt: refused, since it holds more than tensors"):
        read_checkpoint(tmp_path / "last.ckpt")


def test_a_full_disk_keeps_the_earlier_checkpoint(
    images: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The limit of a file's size stands for the disk: the write fails in the middle, as on a full one."""
    size = (whole / "last.ckpt").stat().st_size
    previous = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    stopping_at(monkeypatch, 7, lambda _: resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, previous[1])))
    try:
        status = fit(images, tmp_path, *AVERAGED)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, previous)
        signal.signal(signal.SIGXFSZ, ignored)
    monkeypatch.undo()
    error = capfd.readouterr().err.splitlines()[-1]
    assert status == 2
    assert "cannot write this checkpoint (File too large), the earlier one is kept; make room" in error
    assert not list(tmp_path.glob(".*"))
    assert read_checkpoint(tmp_path / "last.ckpt")["global_step"] == 5
    assert fit(images, tmp_path, *AVERAGED, "--ckpt_path", "last") == 0
    assert_same_bits(weights(tmp_path), weights(whole))


def test_what_keeps_a_checkpoint_from_being_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file where the folder should be")
    with pytest.raises(OSError, match=r"last\.ckpt: cannot write this checkpoint \(File exists\), .*; mend that, then"):
        AtomicCheckpointIO().save_checkpoint({"step": 1}, tmp_path / "run" / "last.ckpt")


def test_a_damaged_checkpoint_does_not_replace_the_previous_one(tmp_path: Path) -> None:
    for step in range(3):
        AtomicCheckpointIO().save_checkpoint({"step": step}, tmp_path / "last.ckpt")
        if step == 1:
            (tmp_path / "last.ckpt").write_bytes(b"damaged")
    assert [read_checkpoint(tmp_path / name)["step"] for name in ("previous.ckpt", "last.ckpt")] == [0, 2]


def test_the_previous_checkpoint_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(*_: Any) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    for step in (1, 2, 3):
        AtomicCheckpointIO().save_checkpoint({"step": step}, tmp_path / "last.ckpt")
    assert read_checkpoint(tmp_path / "last.ckpt") == {"step": 3}
    assert read_checkpoint(tmp_path / "previous.ckpt") == {"step": 2}
    assert len(list(tmp_path.iterdir())) == 2


def test_a_link_that_fails_for_another_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "link", link)
    AtomicCheckpointIO().save_checkpoint({"step": 1}, tmp_path / "last.ckpt")
    with pytest.raises(OSError, match=r"cannot write this checkpoint \(No space left on device\), the earlier one is"):
        AtomicCheckpointIO().save_checkpoint({"step": 2}, tmp_path / "last.ckpt")
    assert read_checkpoint(tmp_path / "last.ckpt") == {"step": 1}
    assert len(list(tmp_path.iterdir())) == 1


def test_a_previous_checkpoint_that_cannot_be_replaced_leaves_nothing_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    checkpoints = AtomicCheckpointIO()
    checkpoints.save_checkpoint({"step": 1}, tmp_path / "last.ckpt")
    monkeypatch.setattr("os.replace", refuse)
    with pytest.raises(OSError, match="the earlier one is kept"):
        checkpoints.save_checkpoint({"step": 2}, tmp_path / "last.ckpt")
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]
