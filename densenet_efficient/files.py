"""Files that are written whole or not at all."""

from __future__ import annotations

import errno
import os
import re
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FULL_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
ROOM = 2**20  # bytes that a new run's logs and configuration take at most
SILENCE = 3600  # seconds without a change, after which no process of another machine still writes a file


@contextmanager
def naming_full_disk(path: Path) -> Iterator[None]:
    """Whatever finds the disk full in this block, its error names `path` at least: a write does not say to what."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL_DISK and error.filename is None:
            error.filename = str(path)
        raise


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Yield a binary file that becomes `path` when the block ends, and leaves no trace if it raises.

    It is on the disk by then, its name too: neither a kill nor a power cut leaves a part of it.
    """
    temporary = temporary_of(path)
    try:
        with naming_full_disk(path), open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_directory(path.parent)
    except OSError as error:
        if error.filename == str(temporary):  # of which nobody else knows
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def temporary_of(path: Path) -> Path:
    """What this process writes before it is `path`: beside it, since a rename is atomic only within a file system."""
    return path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}")


def remove_left_over(paths: Iterable[Path]) -> None:
    """Remove what processes that were killed have left of writing these files.

    The caller must be the only one to write them. In case it is not, as when a queue has started a job again whose
    first machine is only lost from sight, nothing is removed of a process that lives on this machine, nor of another
    machine's unless it has not changed for long.
    """
    for path in paths:
        for temporary in path.parent.glob(f".{path.name}.*"):
            owner = re.fullmatch(r"(?:(.+)\.)?(\d+)", temporary.name.removeprefix(f".{path.name}."))
            if owner is not None and _is_left_over(temporary, owner[1], int(owner[2])):
                temporary.unlink(missing_ok=True)


def _is_left_over(temporary: Path, machine: str | None, process: int) -> bool:
    if machine == os.uname().nodename:
        return process == os.getpid() or not _lives(process)
    try:
        return time.time() - temporary.stat().st_mtime > SILENCE
    except FileNotFoundError:  # which its process has just renamed
        return False


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)  # sends nothing
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


def save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG."""
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=150)


def _sync_directory(path: Path) -> None:
    """Wait until the names in the directory `path` are on the disk: a rename is an entry of its directory."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def prepare_directory(path: Path) -> None:
    """Make the directory `path` if needed and check that it can be written into and has room. Raises OSError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path) as file:
            file.write(bytes(ROOM))
    except OSError as error:
        raise type(error)(f"cannot write into {path} ({error.strerror}); choose another --output") from error
