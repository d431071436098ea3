"""A GPU that does nothing, for a process that has none: a library in the place of the CUDA driver and runtime.

It accepts every launch and counts it, so that what the host does in a step can be looked at without a card. What torch
needs of the many other functions of CUDA and its libraries, to be imported and to run, does nothing at all.
"""

import functools
import os
import re
import shlex
from pathlib import Path

import torch
from processes import ROOT, compiled_library, load_setup, run

from densenet_efficient import _C

FOLDER = Path(__file__).resolve().parent
TORCH = Path(torch.__file__).parent / "lib"
LIBRARIES = [*(TORCH / f"lib{name}.so" for name in ("torch_cuda", "c10_cuda", "torch_python")), Path(_C.__file__)]
FLAGS = ["-O1", "-shared", "-fPIC", "-Wall", "-Werror"]


def obstacle():
    """Why it cannot be built here; None where it can."""
    if torch.version.cuda is None:
        return "torch is a build without CUDA"
    return None if _headers() else "there are no CUDA headers"


def environment():
    """The environment of a process that shall find such a GPU."""
    sources = [path for path in FOLDER.iterdir() if path.suffix in (".c", ".h", ".py")]
    sources += ROOT.glob("csrc/cuda/tape/*.*")  # which may call further functions
    folder = compiled_library("libcuda.so.1", sources, _compile_into).parent
    return os.environ | {"LD_PRELOAD": str(folder / "libcuda.so.1"), "TRITON_LIBCUDA_PATH": str(folder)}


@functools.cache
def _headers():
    """The folder of the toolkit's headers; None without a toolkit."""
    setup = load_setup()
    nvcc = setup.find_nvcc()
    return nvcc and Path(setup.toolkit_of(nvcc), "include")


def _compile_into(library):
    compiler = shlex.split(os.environ.get("CC", "gcc"))
    own = [library.with_name(source.stem + ".o") for source in FOLDER.glob("*.c")]
    for target in own:
        source = FOLDER / f"{target.stem}.c"
        run([*compiler, *FLAGS, "-Wno-attributes", f"-isystem{_headers()}", "-c", str(source), "-o", str(target)])
    defined = set(re.findall(r" T (\w+)", run(["nm", *map(str, own)])))
    rest = library.with_name("rest.c")
    rest.write_text("".join(f"int {name}(void) {{ return 0; }}\n" for name in sorted(_needed() - defined)))
    run([*compiler, *FLAGS, str(rest), *map(str, own), "-Wl,-soname,libcuda.so.1", "-ldl", "-o", str(library)])


def _needed():
    """The functions of CUDA and its libraries that torch and this package are linked with; all of the driver's."""
    undefined = re.findall(r" U (\w+)", run(["nm", "-D", *map(str, LIBRARIES)]))
    linked = {name for name in undefined if re.match(r"(__)?cuda[A-Z]|(cublas|cudnn)[A-Z]", name)}
    driver = re.findall(r"^CUresult CUDAAPI (cu\w+)\(", (_headers() / "cuda.h").read_text(), re.MULTILINE)
    unknown = {"cuFuncGetParamInfo"}  # which older drivers lack too: it would have to know kernels
    return linked | {f"{name}{version}" for name in driver if name not in unknown for version in ("", "_v2")}
