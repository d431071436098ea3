"""The loop over a block's layers as a GPU repeats it: what is recorded, and what C++ makes of it; no GPU needed."""

import os
import struct
from importlib.util import find_spec

import pytest
import torch
from processes import assert_passes_alone

from densenet_efficient import kernels

needs_cuda_build = pytest.mark.skipif(
    kernels.cuda.architectures() is None, reason="the native extension has no CUDA operators"
)


@pytest.mark.skipif(find_spec("triton") is None, reason="no Triton")
def test_repeated_loops_have_the_bits_of_the_loops():
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    assert_passes_alone("taped_training.py", environment)


@needs_cuda_build
def test_pointers_are_put_into_the_arguments():
    from densenet_efficient._C import LaunchTape

    tape = LaunchTape(scratch_bytes=1024, given=[torch.zeros(4), torch.zeros(4)])
    tape.add_result(torch.zeros(3))
    packed = struct.pack("PiPq", 0, 7, 0, 9)
    pointers = [(0, 2, 16), (16, 3, -8)]
    tape.add_launch(1, (1, 2, 3), 128, 0, packed, [0, 8, 16, 24], pointers)
    tape.add_zeros(0, 512, 100)
    launched, zeros = tape.arguments_at([1000, 2000, 3000, 4000])
    assert struct.unpack("PiPq", launched) == (3016, 7, 3992, 9)
    assert zeros == b""


@needs_cuda_build
def test_the_number_of_tensors_is_checked():
    from densenet_efficient._C import LaunchTape

    with pytest.raises(RuntimeError, match="expected 1 tensors, got 2"):
        LaunchTape(0, [torch.zeros(4)]).repeat([torch.zeros(4), torch.zeros(4)])


@needs_cuda_build
def test_tensors_of_another_alignment_are_refused():
    from densenet_efficient._C import LaunchTape

    assert LaunchTape(0, [torch.zeros(4)]).repeat([torch.zeros(4)[1:]]) is None


@needs_cuda_build
def test_layouts_differ_in_dtype_size_and_stride():
    from densenet_efficient._C import layout_of

    tensors = [torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.int32), torch.zeros(3, 2), torch.zeros(3, 2).t()]
    assert len({layout_of([tensor]) for tensor in tensors}) == len(tensors)
    assert layout_of([torch.ones(2, 3)]) == layout_of([torch.zeros(2, 3)])
    assert layout_of(tensors[:2]) != layout_of(tensors[1::-1])
