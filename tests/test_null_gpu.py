"""What the host does for a GPU, looked at without one."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import null_gpu.build
import pytest

from densenet_efficient import kernels


@pytest.mark.skipif(find_spec("triton") is None, reason="no Triton")
@pytest.mark.skipif(kernels.cuda.architectures() is None, reason="the native extension has no CUDA operators")
def test_steps_on_a_gpu_that_does_nothing():
    obstacle = null_gpu.build.obstacle()
    if obstacle is not None:
        pytest.skip(obstacle)
    training = Path(__file__).with_name("null_gpu_training.py")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-n", "0", str(training)]
    environment = null_gpu.build.environment()
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
