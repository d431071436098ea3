"""Files that are written whole or not at all."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FULL_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
ROOM = 2**20  # bytes that a new run's logs and configuration take at most


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
    # Beside it, since a rename is atomic only within a file system.
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with naming_full_disk(path), open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_directory(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


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
