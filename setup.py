"""The native build of `densenet_efficient._C`; everything else about the package stands in pyproject.toml.

Kernel sources (csrc/cpu/kernels) are compiled once per CPU capability, with that capability's compiler flags;
the choice between them is made at run time (csrc/cpu/capability.h). All other sources are compiled once, for
any CPU. The CUDA operators (csrc/cuda) are built where nvcc works and is of the CUDA version of torch.

Environment variables:
    DENSENET_EFFICIENT_NATIVE=0  install without the native operators
    DENSENET_EFFICIENT_CUDA=0    leave the CUDA operators out where they could be built
    CUDA_HOME                    folder of the CUDA toolkit, where nvcc on PATH is not the one to use
    TORCH_CUDA_ARCH_LIST         CUDA architectures, default "8.0;9.0+PTX"
    MAX_JOBS                     number of compilations at a time
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import torch
from setuptools import Extension, setup
from torch.utils import cpp_extension

DEFAULT_CUDA_ARCHITECTURES = "8.0;9.0+PTX"
CUDA_ARCHITECTURE = r"\d+\.\d+[af]?(\+PTX)?"  # torch takes names too
# What the CUDA operators need of a toolkit: to compile and link kernels, and the newest function they call (12.5).
CUDA_PROBE = """
#include <cuda_runtime.h>
__global__ void probe() {}
auto entry = &cudaGetDriverEntryPointByVersion;
void run() { probe<<<1, 1>>>(); }
"""
COMPILER_FLAGS = ["-std=c++20", "-O3", "-g0", "-DNDEBUG", "-fopenmp", "-fvisibility=hidden", "-ffp-contract=fast"]
WARNING_FLAGS = ["-Wall", "-Wextra", "-Wno-psabi", "-Wno-maybe-uninitialized"]  # the last: GCC bug 105593
NVCC_FLAGS = ["-std=c++20", "-O3", "-lineinfo", "-DNDEBUG", "-Xcompiler", "-fvisibility=hidden,-Wall,-Wextra"]
NVCC_ERROR_FLAGS = ["--Werror", "all-warnings", "-Xcompiler", "-Werror"]
NVCC_ERROR_FLAGS += ["-Xptxas", "--warn-on-spills,--warn-on-local-memory-usage"]

AVX2 = ["-mavx2", "-mfma", "-mf16c", "-DCPU_CAPABILITY_AVX2"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"]
AVX512 += ["-mprefer-vector-width=512", "-DCPU_CAPABILITY_AVX512"]
AVX512_BF16 = [*AVX512, "-mavx512bf16", "-DCPU_CAPABILITY_AVX512_BF16"]
AMX = [*AVX512_BF16, "-mamx-tile", "-mamx-bf16", "-DCPU_CAPABILITY_AMX"]

# In ascending order: where several objects define the same inline function the linker keeps the first, and so
# the one compiled for the oldest CPU.
CPU_CAPABILITIES = {"DEFAULT": ["-DCPU_CAPABILITY_DEFAULT"]}
if platform.machine() in ("x86_64", "AMD64"):
    CPU_CAPABILITIES |= {"AVX2": AVX2, "AVX512": AVX512, "AVX512_BF16": AVX512_BF16, "AMX": AMX}


def sources(pattern: str) -> list[str]:
    return sorted(str(path) for path in Path("csrc").glob(pattern))


def why_not_native() -> str | None:
    """The reason to install without the native operators, with its remedy; None when they are built."""
    if os.environ.get("DENSENET_EFFICIENT_NATIVE") == "0":
        return "DENSENET_EFFICIENT_NATIVE=0 is set: unset it and install again"
    compiler = cpp_extension.get_cxx_compiler()
    if shutil.which(shlex.split(compiler)[0]) is None:
        return f"no C++ compiler was found ({compiler}): install g++, or name one in CXX, and install again"
    return None


def cuda_architectures() -> str:
    """As in TORCH_CUDA_ARCH_LIST; where that is empty torch would look for a card."""
    return os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_CUDA_ARCHITECTURES


def find_nvcc() -> str | None:
    """The CUDA compiler: that of CUDA_HOME, else the one on PATH, else the one where the toolkit puts it."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        return shutil.which("nvcc", path=str(Path(home, "bin")))
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def run(*command: str) -> tuple[int, str]:
    process = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return process.returncode, process.stdout


def toolkit_of(nvcc: str) -> str:
    """The folder of nvcc's toolkit, which it tells itself: nvcc on PATH may be a script or a link from elsewhere."""
    top = re.search(r"^#\$ TOP=(.+)$", run(nvcc, "--dryrun", "-c", "none.cu")[1], re.MULTILINE)
    return os.path.realpath(top[1].strip() if top else Path(nvcc).resolve().parents[1])


def why_not_cuda() -> str | None:
    """The reason to leave the CUDA operators out, with its remedy; None when they are built.

    Decided by what can be compiled, never by the presence of a GPU.
    """
    if os.environ.get("DENSENET_EFFICIENT_CUDA") == "0":
        return "DENSENET_EFFICIENT_CUDA=0 was set: unset it and install again"
    architectures = cuda_architectures()
    if not re.fullmatch(f"{CUDA_ARCHITECTURE}([ ;]{CUDA_ARCHITECTURE})*", architectures):
        return (
            f"TORCH_CUDA_ARCH_LIST={architectures} is not made of numbers, by which cards are told apart later: "
            f"write it as in {DEFAULT_CUDA_ARCHITECTURES} and install again"
        )
    wanted = torch.version.cuda
    if wanted is None:
        return "this torch is a build without CUDA: install one with CUDA, then this package again"
    nvcc = find_nvcc()
    remedy = f"install the CUDA toolkit {wanted} or name its folder in CUDA_HOME, then install again"
    if nvcc is None:
        return f"nvcc was not found: {remedy}"
    status, text = run(nvcc, "--version")
    release = re.search(r"release (\d+)\.(\d+)", text)
    if status != 0 or release is None:
        return f"{nvcc} does not run ({last_line(text)}): {remedy}"
    if release[1] != wanted.split(".")[0]:
        return f"{nvcc} is of CUDA {release[1]}.{release[2]}, this torch of CUDA {wanted}: {remedy}"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cu")
        source.write_text(CUDA_PROBE)
        host_compiler = ["-ccbin", os.environ["CC"]] if "CC" in os.environ else []  # as torch chooses it
        flags = [*host_compiler, "-std=c++20", "-arch=sm_80", "-cudart=shared", "-shared", "-Xcompiler=-fPIC"]
        status, text = run(nvcc, *flags, str(source), "-o", str(Path(folder, "probe.so")))
    if status != 0:
        return f"{nvcc} cannot compile and link ({last_line(text)}): {remedy}"
    return None


def last_line(text: str) -> str:
    return ([line.strip() for line in text.splitlines() if line.strip()] or ["no output"])[-1]


def native_extension() -> Extension:
    macros = [(f"WITH_CPU_CAPABILITY_{name}", None) for name in CPU_CAPABILITIES]
    host_sources = sources("*.cpp") + sources("cpu/*.cpp")
    without_cuda = why_not_cuda()
    if without_cuda is not None:
        print(f"densenet_efficient is built without its CUDA operators: {without_cuda}.")
        facts = [f'-DWHY_NOT_CUDA="{escaped(without_cuda)}"']
        extension_type, device = cpp_extension.CppExtension, "cpu"
    else:
        nvcc = find_nvcc()
        assert nvcc is not None
        cpp_extension.CUDA_HOME = toolkit_of(nvcc)
        os.environ.setdefault("TORCH_DONT_CHECK_COMPILER_ABI", "1")  # nvcc was tried, which tells more than a table
        host_sources += sources("cuda/*.cpp") + sources("cuda/tape/*.cpp") + sources("cuda/kernels/*.cu")
        os.environ["TORCH_CUDA_ARCH_LIST"] = cuda_architectures()
        facts = [f'-DCUDA_ARCHITECTURES="{escaped(cuda_architectures())}"']
        extension_type, device = cpp_extension.CUDAExtension, "cuda"
    # Declared as system headers, those of torch and CUDA are exempt from our warnings.
    system_headers = [flag for path in cpp_extension.include_paths(device) for flag in ("-isystem", path)]
    extension = extension_type(
        name="densenet_efficient._C",
        sources=host_sources,
        include_dirs=[str(Path("csrc").resolve())],
        define_macros=macros,
        extra_compile_args={
            "cxx": [*COMPILER_FLAGS, *WARNING_FLAGS, *system_headers],
            "nvcc": [*NVCC_FLAGS, *system_headers, *(NVCC_ERROR_FLAGS if warnings_are_errors() else [])],
        },
    )
    extension.facts = facts
    return extension


def escaped(text: str) -> str:
    """The inside of a string literal of C."""
    return text.replace("\\", "\\\\").replace('"', '\\"')


def warnings_are_errors() -> bool:
    """As CFLAGS has it for the host compiler; it does not reach nvcc by itself."""
    return "-Werror" in shlex.split(os.environ.get("CFLAGS", ""))


def objects_folder(platform_name: str) -> Path:
    """Kept from one build to the next, also by editable installs: only what changed is compiled again."""
    return Path("build", f"objects.{platform_name}-{sys.implementation.cache_tag}-torch{torch.__version__}")


class NativeBuild(cpp_extension.BuildExtension):
    """Torch's build with one more step: the kernels, once per CPU capability."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.build_temp = str(objects_folder(self.plat_name))

    def build_extension(self, extension: Extension) -> None:
        for name, flags in CPU_CAPABILITIES.items():
            extension.extra_objects += self.compile_kernels(extension, name, flags)
        version = self.distribution.get_version()
        extension.define_macros.append(("DENSENET_EFFICIENT_VERSION", f'"{version}"'))
        # Not among the macros, for nvcc would get them too, and the shells it starts do not keep their quotes.
        extension.extra_compile_args["cxx"] += extension.facts
        super().build_extension(extension)

    def compile_kernels(self, extension: Extension, capability: str, flags: list[str]) -> list[str]:
        """The kernel objects of one capability, in a build directory of their own."""
        kernel_sources = sources("cpu/kernels/*.cpp")
        compiler_flags = [*extension.extra_compile_args["cxx"], f"-DCPU_CAPABILITY={capability}", *flags]
        return self.compiler.compile(
            kernel_sources,
            output_dir=str(Path(self.build_temp, capability.lower())),
            macros=extension.define_macros,
            include_dirs=extension.include_dirs,
            debug=self.debug,
            extra_postargs={"cxx": compiler_flags},
        )


if __name__ == "__main__":
    # Ninja lies beside this Python, which need not be an activated environment.
    os.environ["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
    reason = why_not_native()
    if reason is not None:
        print(f"densenet_efficient is built without its native operators: {reason}.")
    setup(ext_modules=[] if reason else [native_extension()], cmdclass={"build_ext": NativeBuild})
