"""`densenet-efficient doctor`: whether this installation computes what it should, on this machine.

What was built and found; the results of every backend that can serve here, in every dtype and at both
levels, against the naive model in float64; the memory and the time of a training step against the naive model's.
Judged are the backends (the one meant for each device must be there), the results and the memory, never the time.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from . import __version__, kernels
from .argument_checks import CHECKPOINTING_LEVELS
from .files import atomic_write
from .measure import make_step, peak_memory_per_image, step_times
from .models import EfficientDenseNet, create_model
from .reference import NaiveDenseNet
from .summary import format_shape
from .summary_table import TABLE_WIDTH

SMALL: dict[str, Any] = {"growth_rate": 8, "block_config": (3, 2), "num_init_features": 12, "num_classes": 10}
IMAGES = (4, 3, 40, 36)
DTYPES = ("float64", "float32", "bfloat16")  # the last by autocast
FLOAT64_BOUND = 1e-9  # relative
FLOOR = 1e-6  # relative, beside twice the naive model's own error
TIMED = "densenet121"
TIMED_SHAPE = (3, 112, 112)
TIMED_BATCH = 8
MEMORY_BATCHES = (8, 40)
Results = dict[str, Tensor]  # outputs, gradients and buffers, by name


@dataclass(frozen=True)
class Backend:
    """A backend of `kernels`, and why it cannot serve its device; None where it can."""

    name: str
    device: str
    obstacle: str | None
    is_default: bool


@dataclass(frozen=True)
class Parity:
    """The relative errors of one backend, dtype and level against the naive model in float64."""

    backend: str
    dtype: str
    checkpointing: str
    errors: dict[str, float]  # of outputs, gradients and buffers
    bounds: dict[str, float]
    failure: str | None = None  # an exception instead of results

    @property
    def problems(self) -> list[str]:
        where = f"backend {self.backend}, {self.dtype}, checkpointing {self.checkpointing}"
        if self.failure is not None:
            return [f"{where}: {self.failure}"]
        return [
            f"{where}: {kind} differ by {error:.1e} from the naive model in float64, at most {self.bounds[kind]:.1e} "
            "is allowed"
            for kind, error in self.errors.items()
            if not error <= self.bounds[kind]
        ]


@dataclass(frozen=True)
class Performance:
    """A training step of the naive model, and of ours by level."""

    workload: str
    step_ms: dict[str, float]
    mib_per_image: dict[str, float]  # empty where the system does not tell a process's peak

    @property
    def problems(self) -> list[str]:
        naive = self.mib_per_image.get("naive", float("inf"))
        return [
            f"memory: {name} takes {mib:.1f} MiB per image, the naive model {naive:.1f}"
            for name, mib in self.mib_per_image.items()
            if name != "naive" and mib >= naive
        ]


@dataclass(frozen=True)
class Examination:
    """Everything that the doctor found."""

    build: dict[str, Any]
    backends: list[Backend]
    parity: list[Parity]
    performance: Performance

    @property
    def problems(self) -> list[str]:
        """What is wrong, a sentence each."""
        missing = [f"backend {b.name}: {b.obstacle}" for b in self.backends if b.is_default and b.obstacle]
        results = [problem for parity in self.parity for problem in parity.problems]
        return [*missing, *results, *self.performance.problems]


def examine(json_path: Path | None = None, console: Console | None = None) -> int:
    """Examine this installation, print what was found, and return 0, or 1 where something is wrong.

    Raises FileNotFoundError at once if there is no folder for ``json_path``.
    """
    if json_path is not None and not json_path.absolute().parent.is_dir():
        raise FileNotFoundError(2, "its folder does not exist", str(json_path))
    console = console or Console()
    console.width = max(console.width, TABLE_WIDTH)
    with console.status("Examining the backends"):
        backends = find_backends()
        parity = [result for backend in backends if backend.obstacle is None for result in compare_backend(backend)]
    with console.status("Measuring memory and time"):
        performance = measure_performance()
    examination = Examination(describe_build(), backends, parity, performance)
    print_examination(examination, console)
    if json_path is not None:
        text = json.dumps(asdict(examination) | {"problems": examination.problems}, indent=2) + "\n"
        with atomic_write(json_path) as file:
            file.write(text.encode())
    return 1 if examination.problems else 0


# ---- what is here ----


def describe_build() -> dict[str, Any]:
    """Versions, the machine, and what the native extension says of itself, None where it is not there."""
    native = None
    if kernels.cpu.is_available():
        from . import _C

        native = dict(_C.build_info())
    return {
        "densenet_efficient": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "native": native,
    }


def find_backends() -> list[Backend]:
    """Every backend, on the device that it is for."""
    here = "cuda" if torch.cuda.is_available() else "cpu"
    backends = []
    for name in kernels.BACKEND_NAMES:
        device = "cuda" if name in kernels.DEFAULTS["cuda"] else "cpu"
        is_default = device in {"cpu", here} and kernels.DEFAULTS[device][0] == name
        backends.append(Backend(name, device, kernels.why_not(name, torch.device(device)), is_default))
    return backends


# ---- results ----


def compare_backend(backend: Backend) -> list[Parity]:
    """A training step of a small network on this backend, in every dtype and at both levels."""
    naive = NaiveDenseNet(**SMALL)
    _randomise(naive)
    truth = run_step(naive, "float64", "cpu")
    results = []
    for dtype in DTYPES:
        own = _errors(run_step(naive, dtype, backend.device), truth)
        bounds = {kind: FLOAT64_BOUND if dtype == "float64" else 2 * error + FLOOR for kind, error in own.items()}
        for level in CHECKPOINTING_LEVELS:
            model = EfficientDenseNet(**SMALL, checkpointing=level)
            model.load_state_dict(naive.state_dict())
            try:
                with use_backend(backend.name):
                    errors = _errors(run_step(model, dtype, backend.device), truth)
                results.append(Parity(backend.name, dtype, level, errors, bounds))
            except Exception as error:  # whatever it is, it belongs into the report
                reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
                results.append(Parity(backend.name, dtype, level, {}, bounds, reason))
    return results


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Serves every device by this backend."""
    before = os.environ.get(kernels.BACKEND_VARIABLE)
    os.environ[kernels.BACKEND_VARIABLE] = name
    try:
        yield
    finally:
        if before is None:
            del os.environ[kernels.BACKEND_VARIABLE]
        else:
            os.environ[kernels.BACKEND_VARIABLE] = before


def run_step(model: nn.Module, dtype: str, device: str) -> Results:
    """Outputs, gradients and buffers of a training step from the weights of ``model``, which stays as it is."""
    autocast = dtype == "bfloat16"
    stored = torch.float32 if autocast else getattr(torch, dtype)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(IMAGES, generator=generator, dtype=torch.float64)
    weights = torch.randn(IMAGES[0], SMALL["num_classes"], generator=generator, dtype=torch.float64)
    model.to(device, stored).train().zero_grad()
    images = images.to(device, stored).requires_grad_()
    with torch.autocast(torch.device(device).type, dtype=torch.bfloat16, enabled=autocast):
        logits = model(images)
    (logits * weights.to(logits)).sum().backward()
    gradients = {f"gradients {name}": parameter.grad for name, parameter in model.named_parameters()}
    buffers = {f"buffers {name}": buffer for name, buffer in model.named_buffers() if buffer.is_floating_point()}
    results = {"outputs": logits, "gradients images": images.grad, **gradients, **buffers}
    copies = {name: value.detach().double().cpu().clone() for name, value in results.items() if value is not None}
    model.to("cpu", torch.float32).load_state_dict(state)
    return copies


def _errors(results: Results, truth: Results) -> dict[str, float]:
    """The relative errors of the outputs, of all gradients together and of all buffers together."""
    return {kind: _error(results, truth, kind) for kind in ("outputs", "gradients", "buffers")}


def _error(results: Results, truth: Results, kind: str) -> float:
    names = [name for name in truth if name.startswith(kind)]
    missing = [name for name in names if name not in results]
    if missing:
        return float("inf")
    expected = torch.cat([truth[name].flatten() for name in names])
    actual = torch.cat([results[name].flatten() for name in names])
    return ((actual - expected).norm() / expected.norm()).item()


def _randomise(model: nn.Module) -> None:
    """Weights and running statistics that no initialisation gives."""
    generator = torch.Generator().manual_seed(1)
    for name, tensor in model.state_dict().items():
        if name.endswith("running_var"):
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
        elif "norm" in name and tensor.is_floating_point():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.25 + name.endswith("weight"))
        elif tensor.is_floating_point():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * (2 / tensor[0].numel()) ** 0.5)


# ---- memory and time ----


def measure_performance() -> Performance:
    """A training step of DenseNet-121 on small images, on the GPU where there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device("meta"):
        config = create_model(TIMED).config
    factories: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {"naive": (NaiveDenseNet, config)}
    for level in CHECKPOINTING_LEVELS:
        factories[level] = (EfficientDenseNet, config | {"checkpointing": level})
    steps = {
        name: make_step(model(**arguments), TIMED_SHAPE, TIMED_BATCH, device=device)
        for name, (model, arguments) in factories.items()
    }
    times = {name: round(value, 1) for name, value in step_times(steps, rounds=3).items()}
    memory = {}
    if device == "cuda" or sys.platform == "linux":
        for name in ("naive", "bottleneck"):
            model, arguments = factories[name]
            factory = f"{model.__module__}:{model.__qualname__}"
            mib = peak_memory_per_image(factory, arguments, TIMED_SHAPE, MEMORY_BATCHES, device=device)
            memory[name] = round(mib, 2)
    images = format_shape(TIMED_SHAPE[1:])
    return Performance(f"{TIMED}, float32, {images}, batch {TIMED_BATCH}, {device}", times, memory)


# ---- printing ----


def print_examination(examination: Examination, console: Console) -> None:
    """The four tables and the judgement."""
    for table in (
        _build_table(examination.build),
        _backend_table(examination.backends),
        _parity_table(examination.parity),
        _performance_table(examination.performance),
    ):
        console.print(table)
    for problem in examination.problems:
        console.print(f"wrong: {problem}", style="red", highlight=False, markup=False)
    console.print("Something is wrong." if examination.problems else "All is well.", style="bold")


def _build_table(build: dict[str, Any]) -> Table:
    table = _table("Build", "", "")
    for name, value in build.items():
        if name == "native":
            for key, detail in (value or {"": "not there"}).items():
                table.add_row(f"native {key}".strip(), str(detail))
        else:
            table.add_row(name, "none" if value is None else str(value))
    return table


def _backend_table(backends: list[Backend]) -> Table:
    table = _table("Backends", "backend", "device", "")
    for backend in backends:
        table.add_row(backend.name, backend.device, backend.obstacle or "found")
    return table


def _parity_table(parity: list[Parity]) -> Table:
    kinds = ("outputs", "gradients", "buffers")
    table = _table(
        "Relative errors against the naive model in float64 (allowed)", "backend", "dtype", "level", *kinds, ""
    )
    for result in parity:
        cells = [f"{result.errors[kind]:.1e} ({result.bounds[kind]:.1e})" if result.errors else "" for kind in kinds]
        verdict = "wrong" if result.problems else "right"
        table.add_row(result.backend, result.dtype, result.checkpointing, *cells, verdict)
    return table


def _performance_table(performance: Performance) -> Table:
    table = _table(f"A training step: {performance.workload}", "", "ms", "of naive", "MiB per image", "less")
    naive_ms, naive_mib = performance.step_ms["naive"], performance.mib_per_image.get("naive")
    for name, time in performance.step_ms.items():
        mib = performance.mib_per_image.get(name)
        less = f"{naive_mib / mib:.1f}x" if mib and naive_mib and mib > 0 else ""
        table.add_row(name, f"{time:.0f}", f"{time / naive_ms:.2f}", "" if mib is None else f"{mib:.1f}", less)
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, overflow="fold")
    return table
