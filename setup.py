"""The native build of `densenet_efficient._C`; everything else about the package stands in pyproject.toml.

Kernel sources (csrc/cpu/kernels) are compiled once per CPU capability, with that capability's compiler flags;
the choice between them is made at run time (csrc/cpu/capability.h). All other sources are compiled once, for
any CPU.

Environment variables:
    DENSENET_EFFICIENT_NATIVE=0  install without the native operators
    DENSENET_EFFICIENT_CUDA=0    leave the CUDA operators out where they could be built
    TORCH_CUDA_ARCH_LIST         CUDA architectures, default "8.0;9.0+PTX"
    MAX_JOBS                     number of compilations at a time
"""

import os
import platform
import shlex
import shutil
import sys
import sysconfig
from pathlib import Path

import torch
from setuptools import Extension, setup
from torch.utils import cpp_extension

DEFAULT_CUDA_ARCHITECTURES = "8.0;9.0+PTX"
COMPILER_FLAGS = ["-std=c++20", "-O3", "-g0", "-DNDEBUG", "-fopenmp", "-fvisibility=hidden", "-ffp-contract=fast"]
WARNING_FLAGS = ["-Wall", "-Wextra", "-Wno-psabi", "-Wno-maybe-uninitialized"]  # the last: GCC bug 105593

AVX2 = ["-mavx2", "-mfma", "-mf16c", "-DCPU_CAPABILITY_AVX2"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"]
AVX512 += ["-mprefer-vector-width=512", "-DCPU_CAPABILITY_AVX512"]
AVX512_BF16 = [*AVX512, "-mavx512bf16", "-DCPU_CAPABILITY_AVX512_BF16"]

# In ascending order: where several objects define the same inline function the linker keeps the first, and so
# the one compiled for the oldest CPU.
CPU_CAPABILITIES = {"DEFAULT": ["-DCPU_CAPABILITY_DEFAULT"]}
if platform.machine() in ("x86_64", "AMD64"):
    CPU_CAPABILITIES |= {"AVX2": AVX2, "AVX512": AVX512, "AVX512_BF16": AVX512_BF16}


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


def with_cuda() -> bool:
    """Decided by what can be compiled, never by the presence of a GPU."""
    wanted = os.environ.get("DENSENET_EFFICIENT_CUDA") != "0"
    return (
        wanted and bool(sources("cuda/*.cu")) and torch.version.cuda is not None and cpp_extension.CUDA_HOME is not None
    )


def native_extension() -> Extension:
    macros = [(f"WITH_CPU_CAPABILITY_{name}", None) for name in CPU_CAPABILITIES]
    host_sources = sources("*.cpp") + sources("cpu/*.cpp")
    extension_type = cpp_extension.CppExtension
    if with_cuda():
        extension_type = cpp_extension.CUDAExtension
        host_sources += sources("cuda/*.cpp") + sources("cuda/*.cu")
        architectures = os.environ.setdefault("TORCH_CUDA_ARCH_LIST", DEFAULT_CUDA_ARCHITECTURES)
        macros.append(("CUDA_ARCHITECTURES", f'"{architectures}"'))
    # Declared as system headers, torch's own are exempt from our warnings.
    system_headers = [flag for path in cpp_extension.include_paths() for flag in ("-isystem", path)]
    return extension_type(
        name="densenet_efficient._C",
        sources=host_sources,
        include_dirs=[str(Path("csrc").resolve())],
        define_macros=macros,
        extra_compile_args={
            "cxx": [*COMPILER_FLAGS, *WARNING_FLAGS, *system_headers],
            "nvcc": ["-std=c++20", "-O3", "-lineinfo"],
        },
    )


class NativeBuild(cpp_extension.BuildExtension):
    """Torch's build with one more step: the kernels, once per CPU capability."""

    def finalize_options(self) -> None:
        super().finalize_options()
        # Kept from one build to the next, also by editable installs: only what changed is compiled again.
        target = f"{self.plat_name}-{sys.implementation.cache_tag}-torch{torch.__version__}"
        self.build_temp = str(Path("build", f"objects.{target}"))

    def build_extension(self, extension: Extension) -> None:
        for name, flags in CPU_CAPABILITIES.items():
            extension.extra_objects += self.compile_kernels(extension, name, flags)
        version = self.distribution.get_version()
        extension.define_macros.append(("DENSENET_EFFICIENT_VERSION", f'"{version}"'))
        super().build_extension(extension)

    def compile_kernels(self, extension: Extension, capability: str, flags: list[str]) -> list[str]:
        """The kernel objects of one capability, in a build directory of their own."""
        kernel_sources = sources("cpu/kernels/*.cpp")
        if not kernel_sources:
            return []
        compiler_flags = [*extension.extra_compile_args["cxx"], f"-DCPU_CAPABILITY={capability}", *flags]
        return self.compiler.compile(
            kernel_sources,
            output_dir=str(Path(self.build_temp, capability.lower())),
            macros=extension.define_macros,
            include_dirs=extension.include_dirs,
            debug=self.debug,
            extra_postargs={"cxx": compiler_flags},
        )


# Ninja lies beside this Python, which need not be an activated environment.
os.environ["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
reason = why_not_native()
if reason is not None:
    print(f"densenet_efficient is built without its native operators: {reason}.")
setup(ext_modules=[] if reason else [native_extension()], cmdclass={"build_ext": NativeBuild})
