"""The CUDA part of the native build: what nvcc makes of it, and when it is left out; no GPU needed."""

import os
import re
import subprocess
from pathlib import Path

import pytest
import torch
from processes import ROOT, load_setup
from torch.utils import cpp_extension

from densenet_efficient.kernels import cpu


@pytest.fixture
def setup(monkeypatch):
    """setup.py as a module, in the environment of a user who set nothing."""
    for name in ("CUDA_HOME", "CUDA_PATH", "DENSENET_EFFICIENT_CUDA", "TORCH_CUDA_ARCH_LIST", "CC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(ROOT)
    return load_setup()


def nvcc_of(setup):
    nvcc = setup.find_nvcc()
    if nvcc is None:
        pytest.skip("there is no nvcc")
    return nvcc


def fake_nvcc(folder, script):
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text(f"#!/bin/sh\n{script}\n")
    nvcc.chmod(0o755)
    return nvcc


def compiled_in():
    """The build_info of the installed extension; None where it was built without CUDA."""
    if not cpu.is_available():
        return None
    from densenet_efficient import _C

    return _C.build_info() if _C.build_info()["cuda_architectures"] else None


@pytest.mark.parametrize("architecture", ["8.0", "9.0"])
def test_nvcc_compiles_every_kernel_without_a_warning(setup, tmp_path, architecture):
    """Also in the installed extension: .ci/run builds it with warnings as errors."""
    info = compiled_in()
    if info is not None and architecture in re.split("[;+ ]", info["cuda_architectures"]):
        return
    nvcc = nvcc_of(setup)
    code = architecture.replace(".", "")
    includes = [f"-I{ROOT / 'csrc'}", *(f"-isystem={path}" for path in cpp_extension.include_paths())]
    flags = [*setup.NVCC_FLAGS, *setup.NVCC_ERROR_FLAGS, *includes, f"-gencode=arch=compute_{code},code=sm_{code}"]
    flags += ["--expt-relaxed-constexpr", "-Xcompiler=-fPIC"]
    for source in setup.sources("cuda/kernels/*.cu"):
        command = [nvcc, *flags, "-c", source, "-o", str(tmp_path / "kernel.o")]
        process = subprocess.run(command, capture_output=True, text=True)
        assert process.returncode == 0, process.stdout + process.stderr


@pytest.mark.skipif(compiled_in() is None, reason="the installed extension has no CUDA operators")
def test_the_extension_needs_no_driver():
    from densenet_efficient import _C

    contents = Path(_C.__file__).read_bytes()
    assert b"libcudart.so" in contents
    assert b"libcuda.so" not in contents


@pytest.mark.skipif(compiled_in() is None, reason="the installed extension has no CUDA operators")
@pytest.mark.parametrize("name", ["channel_stats", "bn_relu_max_pool_backward", "batch_norm_affine"])
def test_the_extension_registers_its_cuda_operators(name):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"densenet_efficient::{name}", "CUDA")


@pytest.mark.parametrize("architectures", ["native", "Hopper", "8.0;Ada", "8.0;"])
def test_architectures_without_numbers_are_refused(setup, architectures, monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", architectures)
    assert f"TORCH_CUDA_ARCH_LIST={architectures} is not made of numbers" in setup.why_not_cuda()


@pytest.mark.parametrize("architectures", ["8.0", "8.0 8.6 9.0+PTX", "9.0a;10.0f+PTX;12.0", ""])
def test_architectures_by_their_numbers_are_built_for(setup, architectures, monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", architectures)
    assert "not made of numbers" not in (setup.why_not_cuda() or "")
    assert setup.cuda_architectures() == (architectures or "8.0;9.0+PTX")


def test_a_script_on_the_path_leads_to_the_toolkit(setup, tmp_path, monkeypatch):
    real = nvcc_of(setup)
    toolkit = setup.toolkit_of(real)
    assert Path(toolkit, "include", "cuda_runtime.h").exists()
    script = fake_nvcc(tmp_path, f'exec {real} "$@"')
    monkeypatch.setenv("PATH", str(script.parent), prepend=os.pathsep)
    assert setup.find_nvcc() == str(script)
    assert setup.toolkit_of(str(script)) == toolkit


def test_cuda_home_comes_first(setup, tmp_path, monkeypatch):
    nvcc = fake_nvcc(tmp_path, "exit 1")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert setup.find_nvcc() == str(nvcc)
    nvcc.unlink()
    assert setup.find_nvcc() is None


def test_cuda_path_says_the_same_as_cuda_home(setup, tmp_path, monkeypatch):
    nvcc = fake_nvcc(tmp_path, "exit 1")
    monkeypatch.setenv("CUDA_PATH", str(tmp_path))
    assert setup.find_nvcc() == str(nvcc)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "elsewhere"))
    assert setup.find_nvcc() is None


def test_nvcc_is_tried_with_the_host_compiler_that_torch_will_choose(setup, tmp_path, monkeypatch):
    fake_nvcc(tmp_path, 'echo release 13.0; case "$*" in *probe*) echo "$*"; exit 1;; esac')
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("CC", "gcc-13")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "link (-ccbin gcc-13 " in setup.why_not_cuda()


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo license expired >&2; exit 3", r"nvcc does not run \(license expired\)"),
        ("echo release 11.8, V11.8.89", r"nvcc is of CUDA 11\.8, this torch of CUDA 13\.0"),
        ('echo release 13.1; case "$*" in *probe*) echo no host compiler; exit 1;; esac', r"link \(no host compiler\)"),
    ],
)
def test_an_nvcc_that_is_of_no_use(setup, tmp_path, monkeypatch, script, reason):
    fake_nvcc(tmp_path, script)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    message = setup.why_not_cuda()
    assert re.search(reason, message)
    assert message.endswith("install the CUDA toolkit 13.0 or name its folder in CUDA_HOME, then install again")


def test_without_an_nvcc(setup, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert setup.why_not_cuda().startswith("nvcc was not found: install the CUDA toolkit 13.0")


def test_a_torch_without_cuda(setup, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert setup.why_not_cuda().startswith("this torch is a build without CUDA: install one with CUDA")


def test_cuda_left_out_is_said_and_recorded(setup, monkeypatch, capsys):
    monkeypatch.setenv("DENSENET_EFFICIENT_CUDA", "0")
    extension = setup.native_extension()
    reason = "DENSENET_EFFICIENT_CUDA=0 was set: unset it and install again"
    assert capsys.readouterr().out == f"densenet_efficient is built without its CUDA operators: {reason}.\n"
    assert extension.facts == [f'-DWHY_NOT_CUDA="{reason}"']
    assert not [source for source in extension.sources if "cuda" in source]


def test_cuda_is_built_where_it_can_be(setup):
    if setup.why_not_cuda() is not None:
        pytest.skip(setup.why_not_cuda())
    extension = setup.native_extension()
    assert extension.facts == ['-DCUDA_ARCHITECTURES="8.0;9.0+PTX"']
    operations = {path.stem for path in ROOT.glob("csrc/cuda/*.cpp")}
    assert {Path(source).stem for source in extension.sources if source.endswith(".cu")} == operations


def test_warnings_are_errors_for_nvcc_too(setup, monkeypatch):
    monkeypatch.setenv("CFLAGS", "-O2 -Werror")
    assert setup.warnings_are_errors()
    monkeypatch.setenv("CFLAGS", "-O2")
    assert not setup.warnings_are_errors()


def test_text_in_a_macro(setup):
    assert setup.escaped(r'the "C:\cuda" folder') == r"the \"C:\\cuda\" folder"
