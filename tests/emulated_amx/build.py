"""The native extension with AMX's tiles in AVX-512, so that the kernels for AMX run on a CPU without it.

Of the extension's objects only the kernels for AMX are compiled again, and the choice between capabilities.
"""

import os
import shlex
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from processes import ROOT, compiled_library, link_package, load_setup, run

from densenet_efficient import _C, kernels

FOLDER = Path(__file__).resolve().parent
CHOICE = "csrc/cpu/capability.cpp"


def obstacle():
    """Why it cannot be built here; None where it can."""
    if kernels.cpu.capabilities()[-1] != "avx512_bf16":
        return "the tiles are emulated in AVX-512 BF16, where the CPU has that and no AMX"
    return None if _objects(load_setup()).is_dir() else "the extension was not built in this checkout"


def environment():
    """The environment of a process whose extension takes the CPU for one with AMX."""
    sources = [path for folder in (FOLDER, ROOT / "csrc") for path in folder.rglob("*.*") if path.suffix != ".pyc"]
    library = compiled_library(Path(_C.__file__).name, sources, _compile_into)
    link = link_package(library.parent) / library.name
    if not link.exists():
        link.symlink_to(library)
    return os.environ | {"PYTHONPATH": str(library.parent), "DENSENET_EFFICIENT_CPU_CAPABILITY": "amx"}


def _objects(setup):
    return ROOT / setup.objects_folder(sysconfig.get_platform())


def _compile_into(library):
    """In the checkout's folder, where setup.py finds the sources."""
    setup = load_setup()
    extension = setup.native_extension()
    kernel_sources, objects = setup.sources("cpu/kernels/*.cpp"), _objects(setup)

    def compiled(source, stand_in, *flags):
        target = library.with_name(Path(source).with_suffix(".o").name)
        flags = [*_flags(extension), *flags, "-include", str(FOLDER / stand_in)]
        run([*_compiler(), *flags, "-c", source, "-o", str(target)])
        return target

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        flags = ["-DCPU_CAPABILITY=AMX", *setup.AMX]
        own = threads.map(lambda source: compiled(source, "tiles.h", *flags), kernel_sources)
        own = [compiled(CHOICE, "cpu.h"), *own]
    others = [objects / Path(source).with_suffix(".o") for source in extension.sources if source != CHOICE]
    for capability in setup.CPU_CAPABILITIES:
        if capability != "AMX":
            folder = objects / capability.lower()
            others += [folder / Path(source).with_suffix(".o") for source in kernel_sources]
    libraries = [f"-L{folder}" for folder in extension.library_dirs] + [f"-l{name}" for name in extension.libraries]
    run([*_compiler(), "-shared", "-fopenmp", *map(str, others + own), *libraries, "-o", str(library)])


def _compiler():
    return shlex.split(os.environ.get("CXX", "g++"))


def _flags(extension):
    macros = [f"-D{name}" for name, _ in extension.define_macros]
    folders = [f"-I{folder}" for folder in extension.include_dirs]
    return [*extension.extra_compile_args["cxx"], "-fPIC", *macros, *folders]
