"""Commands that tests run, the tests that need a process of their own, and the libraries that tests compile."""

import contextlib
import fcntl
import hashlib
import importlib.util
import shlex
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]


def run(command, **options):
    """What it prints; fails with all of it where the command fails."""
    process = subprocess.run(command, capture_output=True, text=True, **options)
    assert process.returncode == 0, f"{shlex.join(command)}\n{process.stdout}{process.stderr}"
    return process.stdout


def run_tests(arguments, environment):
    """The report of pytest in a process of its own; fails where a test does."""
    return run([sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-n", "0", *arguments], env=environment)


def assert_passes_alone(name, environment):
    """Runs the tests of the file ``name`` beside this one in a process of their own."""
    run_tests([str(Path(__file__).with_name(name))], environment)


def load_setup():
    """setup.py as a module, whose build does not run."""
    spec = importlib.util.spec_from_file_location("densenet_efficient_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def link_package(folder):
    """The package's files but for its extension, linked into ``folder``: first on the path it gets one of its own."""
    package = folder / "densenet_efficient"
    package.mkdir(parents=True, exist_ok=True)
    for path in (ROOT / "densenet_efficient").iterdir():
        if path.suffix != ".so" and path.name != "__pycache__" and not (package / path.name).is_symlink():
            with contextlib.suppress(FileExistsError):
                (package / path.name).symlink_to(path)
    return package


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
