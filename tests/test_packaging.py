"""What is built and installed: the native module, its CPU capabilities, the source distribution, the pins."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import PackageNotFoundError, distribution, requires, version
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
CAPABILITY_VARIABLE = "DENSENET_EFFICIENT_CPU_CAPABILITY"

needs_compiler = pytest.mark.skipif(shutil.which(os.environ.get("CXX", "c++")) is None, reason="no C++ compiler")


# The choice is made once in a process, so each request is answered by a fork of one that has not chosen yet.
ANSWER_REQUESTS = f"""
import os
from densenet_efficient import _C

for request in (None, "mmx", *_C.build_info()["cpu_capabilities"]):
    if os.fork():
        os.wait()
        continue
    if request is not None:
        os.environ["{CAPABILITY_VARIABLE}"] = request
    try:
        answer = _C.cpu_capability()
    except Exception as error:
        answer = f"{{type(error).__name__}}: {{error}}"
    os.write(1, f"{{request}}={{answer.splitlines()[0]}}\\n".encode())
    os._exit(0)
"""


def run_python(code: str, cwd: Path, variables: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != CAPABILITY_VARIABLE}
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env=environment | (variables or {}),
        capture_output=True,
        text=True,
    )


def build(hook: str, checkout: Path, variables: dict[str, str] | None = None) -> tuple[int, str]:
    """Exit status and output of one of setuptools' build hooks, which writes its archive into `checkout`."""
    code = f"from setuptools import build_meta; build_meta.{hook}('.')"
    result = run_python(code, checkout, variables)
    return result.returncode, result.stdout + result.stderr


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what a build reads, so that nothing is written into the real one."""
    for name in ("csrc", "densenet_efficient", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


@needs_compiler
def test_build_info_matches_what_is_running() -> None:
    from densenet_efficient import _C

    info = _C.build_info()
    assert info["version"] == version("densenet-efficient")
    assert info["torch"].split(".")[:2] == torch.__version__.split(".")[:2]
    assert info["compiler"]
    assert info["cpu_capabilities"][0] == "default"
    assert info["cuda_architectures"] is None or torch.version.cuda is not None
    assert (info["cuda_architectures"] is None) == (info["why_not_cuda"] is not None)


@needs_compiler
def test_choice_of_the_cpu_capability() -> None:
    from densenet_efficient import _C

    result = run_python(ANSWER_REQUESTS, ROOT)
    assert result.returncode == 0, result.stderr
    answers = dict(line.split("=", maxsplit=1) for line in result.stdout.splitlines())
    assert answers.pop("mmx").startswith(f"ValueError: {CAPABILITY_VARIABLE}='mmx' is not a CPU capability")
    chosen = answers.pop("None")
    assert list(answers) == _C.build_info()["cpu_capabilities"]
    supported = [name for name, answer in answers.items() if answer == name]
    for name in answers.keys() - supported:
        assert answers[name].startswith(f"RuntimeError: {CAPABILITY_VARIABLE}='{name}' is not supported")
    assert supported[0] == "default"
    assert chosen == supported[-1]


def test_source_distribution_holds_what_its_build_needs(checkout: Path) -> None:
    status, output = build("build_sdist", checkout)
    assert status == 0, output
    (archive,) = checkout.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        packed = {name.partition("/")[2] for name in tar.getnames()}
    native = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    package = {str(path.relative_to(ROOT)) for path in (ROOT / "densenet_efficient").rglob("*.py")}
    typing = {"densenet_efficient/_C.pyi", "densenet_efficient/py.typed"}
    assert native | package | typing | {"setup.py", "pyproject.toml", "LICENSE", "README.md"} <= packed


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"CXX": "/nonexistent/c++"}, "no C++ compiler was found (/nonexistent/c++): install g++"),
        ({"DENSENET_EFFICIENT_NATIVE": "0"}, "DENSENET_EFFICIENT_NATIVE=0 is set: unset it"),
    ],
)
def test_without_native_build_a_pure_wheel_says_why(checkout: Path, variables: dict[str, str], reason: str) -> None:
    status, output = build("build_wheel", checkout, variables)
    assert status == 0, output
    assert reason in output
    (wheel,) = checkout.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")


TRAIN = """
import warnings
import torch
import densenet_efficient

model = densenet_efficient.EfficientDenseNet(4, (2, 2), 8, num_classes=3)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(3):
        model(torch.randn(2, 3, 32, 32)).sum().backward()
print(*(warning.message for warning in caught if "densenet_efficient" in str(warning.message)), sep="\\n")
"""


def test_a_pure_wheel_of_the_source_distribution_trains_by_itself_and_says_once_why(
    checkout: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    status, output = build("build_sdist", checkout)
    assert status == 0, output
    unpacked, installed = tmp_path_factory.mktemp("unpacked"), tmp_path_factory.mktemp("installed")
    with tarfile.open(next(checkout.glob("*.tar.gz"))) as archive:
        archive.extractall(unpacked, filter="data")
    (source,) = unpacked.iterdir()
    status, output = build("build_wheel", source, {"CXX": "/nonexistent/c++"})
    assert status == 0, output
    with zipfile.ZipFile(next(source.glob("*.whl"))) as wheel:
        wheel.extractall(installed)
    link_requirements(installed)
    command = [sys.executable, "-I", "-S", "-c", f"import sys; sys.path.append({str(installed)!r}){TRAIN}"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (said,) = result.stdout.splitlines()
    assert "slower plain-torch backend" in said and "densenet_efficient._C could not be imported" in said
    assert "Remedy: with a C++ compiler (g++ or clang++), install the package again" in said


def link_requirements(folder: Path) -> None:
    """Makes ``folder`` an environment of what installing this package alone brings."""
    seen, waiting = set(), list(requires("densenet-efficient") or [])
    while waiting:
        requirement = waiting.pop()
        name = re.split(r"[^\w.-]", requirement)[0]
        if name in seen or "extra ==" in requirement:
            continue
        seen.add(name)
        try:
            found = distribution(name)
        except PackageNotFoundError:  # of another platform
            continue
        for part in {path.parts[0] for path in found.files or []} - {"..", "__pycache__"}:
            if not (folder / part).exists():
                (folder / part).symlink_to(found.locate_file(part))
        waiting += found.requires or []


@needs_compiler
def test_compile_error_fails_the_build(checkout: Path) -> None:
    shutil.rmtree(checkout / "csrc")
    kernels = checkout / "csrc" / "cpu" / "kernels"
    kernels.mkdir(parents=True)
    (kernels / "broken.cpp").write_text('#error "broken on purpose"\n')
    status, output = build("build_wheel", checkout)
    assert status != 0
    assert "broken on purpose" in output
    assert not list(checkout.glob("*.whl"))


def test_every_requirement_is_pinned() -> None:
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {line.partition("==")[0] for line in pins if not line.startswith("#")}
    requirements = requires("densenet-efficient") or []
    required = {re.split(r"[^\w-]", requirement)[0] for requirement in requirements} - {"densenet-efficient"}
    assert "torch" in required
    assert required <= pinned
