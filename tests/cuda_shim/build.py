"""The CUDA operators compiled by a C++ compiler for the CPU, over the headers of this folder."""

import os
import shlex
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from processes import ROOT, compiled_library, run
from torch.utils import cpp_extension

FOLDER = Path(__file__).resolve().parent
# Multiplications and additions are contracted as nvcc does it, where this CPU has the instruction.
FLAGS = ["-std=c++20", "-O2", "-g0", "-fPIC", "-march=native", "-ffp-contract=fast", "-Wall", "-Wextra", "-Werror"]
FLAGS += ["-Wno-maybe-uninitialized", "-Wno-unknown-pragmas"]
INCLUDES = [f"-I{FOLDER}", f"-I{ROOT / 'csrc'}"] + [f"-isystem{path}" for path in cpp_extension.include_paths()]


def library_path():
    sources = [*ROOT.glob("csrc/*.h"), *ROOT.glob("csrc/cuda/**/*.*"), *FOLDER.glob("**/*.*")]
    return compiled_library("cuda_shim.so", [path for path in sources if path.suffix != ".pyc"], compile_into)


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
    libraries = [f"-L{Path(torch.__file__).parent / 'lib'}", "-lc10", "-ltorch_cpu"]
    run([*compiler, "-shared", *map(str, objects), *libraries, "-o", str(library)])
