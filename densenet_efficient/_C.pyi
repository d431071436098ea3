"""The native module: importing it registers `torch.ops.densenet_efficient`."""

from collections.abc import Sequence
from typing import TypedDict

from torch import Tensor, nn

class BuildInfo(TypedDict):
    version: str  # of densenet_efficient
    torch: str  # the version compiled against; the running torch must be of the same minor version
    compiler: str
    cpu_capabilities: list[str]  # ascending: "default", and on x86-64 "avx2", "avx512", "avx512_bf16", "amx"
    cuda_architectures: str | None  # as in TORCH_CUDA_ARCH_LIST; None: built without CUDA
    why_not_cuda: str | None  # the reason and its remedy; None: built with CUDA

def build_info() -> BuildInfo: ...
def cpu_capability() -> str:
    """The CPU capability in use: DENSENET_EFFICIENT_CPU_CAPABILITY, else the best that this CPU supports.

    Raises:
        ValueError: the environment variable names a capability that this build does not have.
        RuntimeError: it names one that this CPU does not support.
    """

class ModuleSnapshot:
    """What modules are made of, all the way down: classes, attributes, parameters, buffers, hooks."""

    def __init__(self, modules: Sequence[nn.Module | None], *, with_values: bool) -> None: ...
    def matches(self, modules: Sequence[nn.Module | None]) -> bool:
        """Whether all of it is still the same, no tensor changed in place included."""

class LaunchTape:
    """Recorded launches of kernels; only in a build with CUDA. See csrc/cuda/tape/launch_tape.h."""

    def __init__(self, scratch_bytes: int, given: Sequence[Tensor]) -> None: ...
    def add_result(self, result: Tensor) -> None: ...
    def add_launch(
        self,
        kernel: int,
        blocks: tuple[int, int, int],
        threads: int,
        shared_bytes: int,
        arguments: bytes,
        offsets: Sequence[int],
        pointers: Sequence[tuple[int, int, int]],
    ) -> None: ...
    def add_zeros(self, memory: int, displacement: int, bytes: int) -> None: ...
    @property
    def graphs(self) -> int: ...
    def repeat(self, given: Sequence[Tensor]) -> list[Tensor] | None: ...
    def arguments_at(self, memories: Sequence[int]) -> list[bytes]: ...

def kernel_takes(kernel: int, arguments: Sequence[tuple[int, int]]) -> bool:
    """Whether a kernel takes arguments of just these offsets and sizes; only in a build with CUDA."""

def layout_of(tensors: Sequence[Tensor]) -> bytes:
    """All of tensors but their addresses; only in a build with CUDA."""
