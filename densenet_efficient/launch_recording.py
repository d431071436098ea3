"""Records what a function launches on a GPU, and repeats it on other tensors from C++ (`csrc/cuda/tape/launch_tape.h`).

A step launches thousands of small kernels. Deciding anew on each of them, and on the memory of what lies between, takes
Python longer than the card takes for their work, and nothing of it depends on anything but the tensors' layouts.

A recording watches every tensor that a function makes. What it may do beside launching our kernels: make tensors, zeros
too, look at parts of them, and add one to another. Anything else is an obstacle, and nothing is recorded.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .kernels.triton import accumulate, launch
from .layout import is_channels_last

aten = torch.ops.aten
ALLOCATIONS = {
    aten.empty.memory_format,
    aten.empty_like.default,
    aten.empty_strided.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
}
POINTER = struct.Struct("P")
FORMATS = {"i32": "i", "i64": "q", "u64": "Q"}  # of integers, by Triton's names; kernels take no other numbers
SCRATCH_POINTERS = 2  # behind a kernel's own arguments Triton passes two, which are null where it needs no such memory
SCRATCH_ALIGNMENT = 512
THREADS_PER_WARP = 32


@dataclass(eq=False)
class Memory:
    """The storage of a tensor that was made while recording; its first and last launch, by their indices."""

    size: int
    first: int | None = None
    last: int = 0


@dataclass(frozen=True)
class Address:
    """Bytes from the beginning of a tensor that was given, by its index, or of a memory."""

    memory: int | Memory
    displacement: int


Argument = tuple[str, int | Address]  # its type, as Triton names it, and its value


@dataclass(frozen=True)
class Zeros:
    """A tensor that is filled with zeros."""

    address: Address
    size: int

    @property
    def addresses(self) -> list[Address]:
        return [self.address]


@dataclass(frozen=True)
class Launch:
    """A kernel and what it was launched with: numbers, and an address in place of each tensor."""

    compiled: Any
    blocks: tuple[int, int, int]
    arguments: list[Argument]

    @property
    def addresses(self) -> list[Address]:
        return [value for _, value in self.arguments if isinstance(value, Address)]


class Recording(TorchDispatchMode):
    """Records while it is entered. What launches read and write is made meanwhile, or part of what is given.

    Args:
        buffers: tensors of which any part may be used, with a storage each.
        vectors: tensors that are used from their first element on.
    """

    def __init__(self, buffers: Sequence[Tensor], vectors: Sequence[Tensor]) -> None:
        super().__init__()
        self.given = [*buffers, *vectors]
        self.obstacle: str | None = None
        self._buffers = {_storage_address(tensor): index for index, tensor in enumerate(buffers)}
        self._vectors = {tensor.data_ptr(): len(buffers) + index for index, tensor in enumerate(vectors)}
        if len(self._buffers) + len(self._vectors) < len(self.given):
            self._refuse("tensors that share their memory")
        self._memories: dict[int, Memory] = {}  # by the address of their storage, the latest there
        self._steps: list[Launch | Zeros] = []

    def __enter__(self) -> Recording:
        self._listening = launch.listening(self)
        self._listening.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._listening.__exit__(*exception)

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is aten.add_.Tensor and _are_alike(*args) and not kwargs:
            accumulate.accumulate(*args)
            return args[0]
        result = function(*args, **(kwargs or {}))
        if function in ALLOCATIONS or function is aten.new_zeros.default:
            self._memories[_storage_address(result)] = Memory(result.untyped_storage().nbytes())
            if function is aten.new_zeros.default:
                self._steps.append(Zeros(self._use(result), result.untyped_storage().nbytes()))
        elif function._schema.is_mutable or not _is_view(result, args[0]):
            self._refuse(f"{function} is not recorded")
        return result

    def launched(self, compiled: Any, blocks: Sequence[int], arguments: Sequence[Any]) -> None:
        """As `launch.Listener` has it."""
        if 0 in blocks:  # nothing was launched, and the driver refuses it
            return
        metadata = compiled.metadata
        if metadata.num_ctas != 1 or metadata.launch_cooperative_grid or metadata.launch_pdl:
            self._refuse(f"{compiled.name} is launched in a way of its own")
        if metadata.global_scratch_size or metadata.profile_scratch_size:
            self._refuse(f"{compiled.name} needs memory from Triton")
        x, y, z = (*blocks, 1, 1)[:3]
        taken = [
            (kind, self._use(value) if isinstance(value, Tensor) else value)
            for kind, value in zip(compiled.src.signature.values(), arguments, strict=True)
            if kind != "constexpr"
        ]
        self._steps.append(Launch(compiled, (x, y, z), taken))

    def _refuse(self, obstacle: str) -> None:
        """The first obstacle is kept."""
        self.obstacle = self.obstacle or obstacle

    def _use(self, tensor: Tensor) -> Address:
        """Where the tensor lies, at the launch that comes next."""
        address, storage = tensor.data_ptr(), _storage_address(tensor)
        vector = self._vectors.get(address)
        if vector is not None:
            return Address(vector, 0)
        buffer = self._buffers.get(storage)
        if buffer is not None:
            return Address(buffer, address - self.given[buffer].data_ptr())
        memory = self._memories.get(storage)
        if memory is None:
            self._refuse("a tensor that was neither given nor made")
            return Address(0, 0)
        if memory.first is None:
            memory.first = len(self._steps)
        memory.last = len(self._steps)
        return Address(memory, address - storage)

    def tape(self, results: Sequence[Tensor]) -> Any:
        """A `densenet_efficient._C.LaunchTape` of what was recorded, whose repetitions make ``results`` anew.

        None where there was an obstacle, which `obstacle` then names.
        """
        from ._C import LaunchTape, kernel_takes

        made = [self._memories.get(_storage_address(result)) for result in results]
        if None in made or len(set(map(id, made))) < len(made):
            self._refuse("results that share their memory")
        if self.obstacle is not None:
            return None
        results_at = {memory: (1 + len(self.given) + index, 0) for index, memory in enumerate(made) if memory}
        scratch_bytes, offsets = _lay_out([memory for memory in self._used() if memory not in results_at])
        places = results_at | {memory: (0, offset) for memory, offset in offsets.items()}
        tape = LaunchTape(scratch_bytes, self.given)
        for result in results:
            tape.add_result(result)

        def place(address: Address) -> tuple[int, int]:
            """The index of a memory of the tape (0: scratch, then the given, then the results) and a displacement."""
            memory = address.memory
            index, offset = (1 + memory, 0) if isinstance(memory, int) else places[memory]
            return index, offset + address.displacement

        for step in self._steps:
            if isinstance(step, Zeros):
                tape.add_zeros(*place(step.address), step.size)
                continue
            packed, layout, pointers = _pack(step.arguments)
            if not kernel_takes(step.compiled.function, layout):
                self._refuse(f"{step.compiled.name} takes other arguments than this package knows of")
                return None
            tape.add_launch(
                step.compiled.function, step.blocks, step.compiled.metadata.num_warps * THREADS_PER_WARP,
                step.compiled.metadata.shared, packed, [offset for offset, _ in layout],
                [(offset, *place(address)) for offset, address in pointers],
            )  # fmt: skip
        return tape

    def kernels(self) -> list[Any]:
        """Triton's compiled kernels, once each, which have to live as long as the tape."""
        return list(dict.fromkeys(step.compiled for step in self._steps if isinstance(step, Launch)))

    def _used(self) -> list[Memory]:
        """The memories that launches use, once each, by their first."""
        addresses = (address for step in self._steps for address in step.addresses)
        return list(dict.fromkeys(address.memory for address in addresses if isinstance(address.memory, Memory)))


def _pack(arguments: Sequence[Argument]) -> tuple[bytes, list[tuple[int, int]], list[tuple[int, Address]]]:
    """The arguments one after the other, each aligned to its size; (offset, size) of each; those that are addresses."""
    packed, layout, pointers = bytearray(), [], []
    for kind, value in [*arguments, *([("*", 0)] * SCRATCH_POINTERS)]:
        number = struct.Struct(FORMATS[kind]) if kind in FORMATS else POINTER
        packed += bytes(-len(packed) % number.size)
        layout.append((len(packed), number.size))
        if isinstance(value, Address):
            pointers.append((len(packed), value))
        packed += number.pack(0 if isinstance(value, Address) else value)
    return bytes(packed), layout, pointers


def _lay_out(memories: Sequence[Memory]) -> tuple[int, dict[Memory, int]]:
    """Bytes for all memories, and the offset of each: the lowest beside those in use at the same time."""
    offsets: dict[Memory, int] = {}
    total = 0
    for memory in memories:
        offset = 0
        for other in sorted((o for o in offsets if o.last >= (memory.first or 0)), key=offsets.__getitem__):
            if offset + memory.size <= offsets[other]:
                break
            offset = max(offset, offsets[other] + other.size)
            offset += -offset % SCRATCH_ALIGNMENT
        offsets[memory] = offset
        total = max(total, offset + memory.size)
    return total, offsets


def _storage_address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _is_view(result: Any, of: Any) -> bool:
    """Whether all results are parts of the first argument."""
    results = result if isinstance(result, (list, tuple)) else [result]
    return isinstance(of, Tensor) and all(
        isinstance(part, Tensor) and _storage_address(part) == _storage_address(of) for part in results
    )


def _are_alike(tensor: Any, other: Any = None) -> bool:
    """Whether two tensors are of one dtype and one layout without gaps."""
    return (
        isinstance(other, Tensor)
        and tensor.dtype == other.dtype
        and tensor.shape == other.shape
        and tensor.stride() == other.stride()
        and (tensor.is_contiguous() or is_channels_last(tensor))
    )
