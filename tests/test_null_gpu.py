"""What the host does for a GPU, looked at without one."""

from importlib.util import find_spec

import null_gpu.build
import pytest
from processes import assert_passes_alone

from densenet_efficient import kernels


@pytest.mark.skipif(find_spec("triton") is None, reason="no Triton")
@pytest.mark.skipif(kernels.cuda.architectures() is None, reason="the native extension has no CUDA operators")
def test_steps_on_a_gpu_that_does_nothing():
    obstacle = null_gpu.build.obstacle()
    if obstacle is not None:
        pytest.skip(obstacle)
    assert_passes_alone("null_gpu_training.py", null_gpu.build.environment())
