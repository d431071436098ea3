"""Files are written whole or not at all; what is left of a write that was killed, and whose it is to remove."""

from __future__ import annotations

import errno
import os
import tempfile
import time
from io import FileIO
from pathlib import Path

import pytest

from densenet_efficient.files import SILENCE, atomic_write, naming_full_disk, prepare_directory, remove_left_over


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a run begins, and by the file that is written."""
    named = pytest.raises(OSError, match=f"No space left on device: '{tmp_path}/file'")
    with named, naming_full_disk(tmp_path), atomic_write(tmp_path / "file"):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda dir: FileIO("/dev/full", "w"))
    with pytest.raises(OSError, match=rf"cannot write into {tmp_path} \(No space left on device\); choose another"):
        prepare_directory(tmp_path)


def test_a_name_is_on_the_disk_before_the_write_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file first, then the directory, once it holds the new name."""
    synced: list[str] = []

    def fsync(descriptor: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        assert (tmp_path / "file").exists() == (synced[-1] == str(tmp_path))

    monkeypatch.setattr(os, "fsync", fsync)
    with atomic_write(tmp_path / "file") as file:
        file.write(b"whole")
    assert len(synced) == 2 and synced[-1] == str(tmp_path)


def test_a_failed_write_leaves_the_earlier_file_alone(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"earlier")
    with pytest.raises(TypeError), atomic_write(tmp_path / "file") as file:
        file.write("text, where bytes are expected")  # type: ignore[arg-type]
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"earlier"


def test_a_write_that_fails_names_the_file_that_was_to_be_written(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as failure, atomic_write(tmp_path / "nowhere" / "file"):
        pass
    assert failure.value.filename == str(tmp_path / "nowhere" / "file")


def test_what_may_still_be_written_is_not_removed(tmp_path: Path) -> None:
    """By a process of this machine that lives, or of another one, by whatever number; nor files of other names."""
    here, mine, other = os.uname().nodename, os.getpid(), os.getppid()
    long_ago = time.time() - SILENCE - 60
    fresh = {".last.ckpt.node.7.1234567", ".last.ckpt.77"}
    kept = {f".last.ckpt.{here}.{other}", ".other.ckpt.77", ".last.ckpt.x", "last.ckpt"}
    removed = {f".last.ckpt.{here}.{mine}", ".last.ckpt.node.7.1234568", ".last.ckpt.78"}
    for name in fresh | kept | removed:
        (tmp_path / name).write_bytes(b"half")
        if name not in fresh:
            os.utime(tmp_path / name, (long_ago, long_ago))
    remove_left_over([tmp_path / "last.ckpt", tmp_path / "best.ckpt"])
    assert {path.name for path in tmp_path.iterdir()} == fresh | kept


def test_what_another_users_process_may_still_write_is_not_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill(process: int, number: int) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "kill", kill)
    theirs = tmp_path / f".last.ckpt.{os.uname().nodename}.{os.getppid()}"
    theirs.write_bytes(b"half")
    remove_left_over([tmp_path / "last.ckpt"])
    assert theirs.exists()


def test_what_another_machine_has_just_finished_writing_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    half, whole = tmp_path / ".last.ckpt.node.77", tmp_path / "last.ckpt"
    half.write_bytes(b"whole")

    def renamed(folder: Path, pattern: str) -> list[Path]:
        half.rename(whole)
        return [half]

    monkeypatch.setattr(Path, "glob", renamed)
    remove_left_over([whole])
    assert whole.read_bytes() == b"whole" and not half.exists()
