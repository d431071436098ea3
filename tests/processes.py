"""Libraries that tests compile for themselves, once for all workers."""

import fcntl
import hashlib
import shlex
import subprocess
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]


def compiled_library(name, sources, compile_into):
    """The library ``name``, kept in build/ until one of its sources changes; ``compile_into`` makes it at a path."""
    contents = "".join(path.read_text() for path in sorted(sources))
    digest = hashlib.sha256((torch.__version__ + contents).encode()).hexdigest()[:16]
    folder = ROOT / "build" / "tests" / digest
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / name
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the workers of pytest-xdist ask at the same time
        if not library.exists():
            unfinished = folder / f"{name}.part"
            compile_into(unfinished)
            unfinished.replace(library)
    return library


def run(command):
    """What it prints; fails with all of it where the command fails."""
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, f"{shlex.join(command)}\n{process.stdout}{process.stderr}"
    return process.stdout
