"""Fixtures of all tests; its cases come from `cases` and `kernel_cases`."""

from importlib.util import find_spec

import pytest
import torch
from cases import CPU_BACKENDS, needs_native

from densenet_efficient import kernels

# torch brings Triton on Linux only.
NEED_TRITON = ["test_triton_compile.py", "test_triton_kernels.py", "test_triton_launch.py"]
collect_ignore = [] if find_spec("triton") else NEED_TRITON


def pytest_configure(config):
    config.addinivalue_line(
        "markers",
        "own_process: forks, or handles a signal; not within a worker of xdist, whose process serves others too",
    )
    config.addinivalue_line("markers", "large: reserves gigabytes of address space, of which it touches little")
    config.addinivalue_line("markers", "each_capability: runs again with every capability of the CPU")


@pytest.fixture
def one_thread():
    """On tensors this small, threads wait for each other longer than they work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def nan_memory():
    """Fills what torch.empty and `kernels.empty_kept` allocate with NaN, so that an element that nobody wrote shows."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # the reference has an atomic addition on a GPU
    assert torch.empty(1).isnan().all() and kernels.empty_kept(torch.empty(1), 1).isnan().all()
    assert kernels.empty_kept_images(torch.empty(1), 1, 1, 1).isnan().all()
    yield
    torch.use_deterministic_algorithms(deterministic)


@pytest.fixture(params=CPU_BACKENDS)
def backend(request, monkeypatch):
    """Runs the test on each backend of the CPU."""
    monkeypatch.setenv(kernels.BACKEND_VARIABLE, request.param)
    return request.param


@pytest.fixture(params=[pytest.param("cpu", marks=needs_native)])
def native_backend(request, monkeypatch):
    """Runs the test on the native CPU backend alone."""
    monkeypatch.setenv(kernels.BACKEND_VARIABLE, request.param)
