"""The CUDA operators compiled by a C++ compiler for the CPU, over the headers of this folder."""

import fcntl
import hashlib
import os
import shlex
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.utils import cpp_extension

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[1]
# Multiplications and additions are contracted as nvcc does it, where this CPU has the instruction.
FLAGS = ["-std=c++20", "-O2", "-g0", "-fPIC", "-march=native", "-ffp-contract=fast", "-Wall", "-Wextra", "-Werror"]
FLAGS += ["-Wno-maybe-uninitialized", "-Wno-unknown-pragmas"]
INCLUDES = [f"-I{FOLDER}", f"-I{ROOT / 'csrc'}"] + [f"-isystem{path}" for path in cpp_extension.include_paths()]


def library_path():
    """The compiled library, kept in build/ until one of its sources changes."""
    sources = sorted([*ROOT.glob("csrc/*.h"), *ROOT.glob("csrc/cuda/**/*.*"), *FOLDER.glob("**/*.*")])
    contents = "".join(path.read_text() for path in sources if path.suffix != ".pyc")
    digest = hashlib.sha256((torch.__version__ + contents).encode()).hexdigest()[:16]
    folder = ROOT / "build" / "cuda_shim" / digest
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / "cuda_shim.so"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the workers of pytest-xdist ask at the same time
        if not library.exists():
            compile_into(library)
    return library


def compile_into(library):
    compiler = shlex.split(cpp_extension.get_cxx_compiler())
    sources = [*sorted(FOLDER.glob("*.cpp")), *sorted(ROOT.glob("csrc/cuda/kernels/*.cu"))]
    objects = [library.with_name(source.name + ".o") for source in sources]
    commands = [
        [*compiler, *FLAGS, *INCLUDES, "-x", "c++", "-c", str(source), "-o", str(target)]
        for source, target in zip(sources, objects, strict=True)
    ]
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", "2"))) as pool:
        list(pool.map(run, commands))
    unfinished = library.with_suffix(".part")
    libraries = [f"-L{Path(torch.__file__).parent / 'lib'}", "-lc10", "-ltorch_cpu"]
    run([*compiler, "-shared", *map(str, objects), *libraries, "-o", str(unfinished)])
    unfinished.replace(library)


def run(command):
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, f"{shlex.join(command)}\n{process.stdout}{process.stderr}"
