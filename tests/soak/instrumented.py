"""`python tests/soak/instrumented.py NAME`: the native extension compiled with a sanitizer, or to count its lines.

It goes into build/NAME beside links to the package's Python files: with that folder first on PYTHONPATH the package is
the one of this checkout, with the instrumented extension. Only what has changed is compiled again.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PLAIN = ["-O0", "-fno-sanitize=all"]
FOLDER = Path(__file__).resolve().parent
THREADS, SUPPRESSIONS = FOLDER / "std_threads", FOLDER / "thread_sanitizer.txt"


class Instrument(NamedTuple):
    """How the extension is compiled, and the run-time library that Python needs from its start."""

    flags: list[str]
    capabilities: list[str]  # of the CPU, those instrumented besides its best
    runtime: str | None = None
    environment: dict[str, str] = {}  # noqa: RUF012


# Multiplications and additions are contracted by one of the expensive optimisations only.
INSTRUMENTS = {
    # The code of avx512 and avx512_bf16 is part of that of amx.
    "address": Instrument(
        [
            "-O1",
            "-g1",
            "-fopenmp",
            "-fsanitize=address,undefined",
            "-fno-sanitize-recover=all",
            "-fno-omit-frame-pointer",
        ],
        ["default", "avx2"],
        "libasan.so",
        {"ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1", "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1"},
    ),
    "thread": Instrument(
        ["-O1", "-fexpensive-optimizations", "-g1", f"-I{THREADS}", "-fsanitize=thread"],
        ["default"],
        "libtsan.so",
        {"TSAN_OPTIONS": f"halt_on_error=0:exitcode=66:suppressions={SUPPRESSIONS}"},
    ),
    "coverage": Instrument(
        ["-O0", "-g1", "-fopenmp", "--coverage"], ["default", "avx2", "avx512", "avx512_bf16", "amx"]
    ),
}


def capabilities_of(name: str) -> list[str]:
    """The CPU capabilities for which the extension ``name`` is instrumented, of those that this CPU has."""
    from densenet_efficient.kernels import cpu

    available = cpu.capabilities()
    wanted = {*INSTRUMENTS[name].capabilities, available[-1]}
    return [capability for capability in available if capability in wanted]


def build(name: str) -> Path:
    """The folder of the instrumented package."""
    folder = ROOT / "build" / name
    sys.path.insert(0, str(FOLDER.parent))
    from processes import link_package, load_setup

    link_package(folder)
    setup = load_setup()
    instrument, instrumented = INSTRUMENTS[name], capabilities_of(name)
    kept = [flag for flag in setup.COMPILER_FLAGS if flag not in ("-O3", "-g0", "-fopenmp")]
    setup.COMPILER_FLAGS = [*instrument.flags, *kept]
    for capability, its_flags in setup.CPU_CAPABILITIES.items():
        if capability.lower() not in instrumented:
            its_flags += PLAIN  # there only to be linked

    class Build(setup.NativeBuild):
        def finalize_options(self):
            super().finalize_options()
            self.build_temp = str(folder / "objects")

    os.environ |= {"DENSENET_EFFICIENT_CUDA": "0", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    os.chdir(ROOT)
    extension = setup.native_extension()
    extension.extra_link_args += [flag for flag in instrument.flags if flag.startswith(("-f", "--coverage"))]
    setup.setup(
        ext_modules=[extension],
        cmdclass={"build_ext": Build},
        script_args=["build_ext", "--build-lib", str(folder)],
    )
    return folder


def build_apart(name: str) -> None:
    """The same in a process of its own."""
    process = subprocess.run([sys.executable, __file__, name], capture_output=True, text=True)
    assert process.returncode == 0, process.stdout[-3000:] + process.stderr[-3000:]


def environment_for(name: str) -> dict[str, str]:
    """What Python must be started with to load the extension ``name``."""
    instrument = INSTRUMENTS[name]
    # The C++ library too: a sanitizer looks for what it intercepts when the process starts.
    libraries = [library_path(library) for library in (instrument.runtime, "libstdc++.so") if library]
    return instrument.environment | {
        "LD_PRELOAD": " ".join(libraries),
        "OMP_NUM_THREADS": "4",
        "OMP_WAIT_POLICY": "passive",
    }


def library_path(name: str) -> str:
    compiler = os.environ.get("CXX", "g++").split()
    return subprocess.run([*compiler, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    build(sys.argv[1])
