"""`plan`: the memory of a network before it runs, and what fits a budget."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ..argument_checks import CHECKPOINTING_LEVELS, check_positive, levels_of
from ..summary import format_shape, minimum_size, summarize, total_costs
from .free_bottlenecks import training_step, usual_shape
from .shapes import NetworkShape, blocks_of, shape_of
from .sizes import format_bytes, parse_bytes
from .timeline import OPTIMIZERS, Optimizer, Peak, StageMemory, TrainingStep, inference_peak

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class MemoryPlan:
    """The predicted memory of a network; all in bytes, of tensors alone.

    What the interpreter, the libraries and a GPU's context take comes on top of it.
    """

    model: str
    input_shape: tuple[int, ...]  # N, C, H, W
    dtype: str
    optimizer: str
    checkpointing: list[str]  # one level per block
    offloaded: list[bool]  # per block, whether its storage waits in the host's memory
    on_host: int  # what waits there, in pinned memory
    training: Peak
    inference: Peak
    stages: list[StageMemory]  # of the training step
    recomputed: float  # multiply-adds of the recomputation, as a share of those of a forward
    budget: int | None
    largest_batch: int | None  # of these images; None without a budget, 0 where not even one fits
    largest_size: int | None  # height and width at this batch; likewise

    @property
    def fits(self) -> bool:
        """Whether the training step keeps within the budget."""
        return self.budget is None or self.training.peak <= self.budget

    def check_fits(self) -> None:
        """Raises a ValueError that names the remedies unless the training step keeps within the budget."""
        if self.fits:
            return
        remedies = []
        if self.largest_batch:
            remedies.append(f"a batch of at most {self.largest_batch}")
        if self.largest_size:
            remedies.append(f"images of at most {self.largest_size}x{self.largest_size}")
        raise ValueError(
            f"a training step of {self.model} on {format_shape(self.input_shape)} needs "
            f"{format_bytes(self.training.peak)} at least, the budget is {format_bytes(self.budget or 0)}; remedy: "
            + ", or ".join([*remedies, "a larger budget"])
        )


def plan(
    model: Any,
    input_shape: Sequence[int],
    dtype: torch.dtype | str = torch.float32,
    *,
    batch: int | None = None,
    budget: int | str | None = None,
    optimizer: str = "adamw",
    checkpointing: str | Sequence[str] | None = None,
    offload: bool = False,
) -> MemoryPlan:
    """The predicted peak memory of a training step and of an inference; nothing is run or allocated.

    Args:
        model: an `EfficientDenseNet`, a converted torchvision DenseNet, or a name of `create_model`.
        input_shape: [N, C, H, W] of the images, or [C, H, W] with ``batch``.
        dtype: of the activations. bfloat16 and float16 are autocast of float32 weights, unless the model's are such.
        batch: N, where ``input_shape`` has none.
        budget: bytes, or text such as "8GiB". With it the levels are chosen: of the mixes of levels per block that fit
            the one with the fewest multiply-adds to recompute, then the lowest peak. Where none fits, they are all
            "bottleneck", which needs the least, and `MemoryPlan.fits` is false.
        optimizer: "sgd", "sgd-momentum", "rmsprop", "adam" or "adamw".
        checkpointing: the levels to predict, one or one per block; with a budget they are not chosen then. Without
            either they are the model's own.
        offload: whether the storages of a GPU's blocks may wait for their backward in the host's memory. They do where
            the levels that fit recompute less for it. A model given by its name is then taken to be on a GPU.

    Raises:
        TypeError, ValueError: an argument is of another type, unknown, or does not fit the network.
    """
    name, network = (model, _on_meta(model)) if isinstance(model, str) else (type(model).__name__, model)
    blocks = blocks_of(network)
    shape = _with_batch(input_shape, batch)
    computed = _dtype(dtype)
    states = _optimizer(optimizer)
    device = _device(network, offload)
    limit = None if budget is None else parse_bytes(budget)
    given = None if checkpointing is None else Mix(tuple(levels_of(checkpointing, len(blocks))))
    if offload and (limit is None or given is not None):
        raise ValueError("storages are offloaded to keep within a budget: give one, and no levels of checkpointing")

    usual = usual_shape(list(network.features), device)

    def step(images: Sequence[int], mix: Mix) -> TrainingStep:
        buffers = shape_of(network, images, computed, device, usual)
        return training_step(buffers, mix.levels, states, device, mix.offloaded)

    chosen = given or Mix(tuple(block.checkpointing for block in blocks))
    largest_batch = largest_size = None
    if limit is not None:
        buffers = shape_of(network, shape, computed, device, usual)
        chosen = given or cheapest_mix(buffers, states, device, limit, offload)
        least = given or Mix.least(len(blocks), offload)
        largest_batch, largest_size = _what_fits(
            lambda images: step(images, least).peak().peak, limit, shape, minimum_size(network)
        )
    training = step(shape, chosen)
    return MemoryPlan(
        model=name,
        input_shape=shape,
        dtype=str(computed).removeprefix("torch."),
        optimizer=optimizer,
        checkpointing=list(chosen.levels),
        offloaded=list(training.offloaded),
        on_host=training.on_host,
        training=training.peak(),
        inference=inference_peak(training.shape, device),
        stages=training.stages(),
        recomputed=training.recomputed / total_costs(summarize(network, shape)).multiply_adds,
        budget=limit,
        largest_batch=largest_batch,
        largest_size=largest_size,
    )


class Mix(NamedTuple):
    """One level per block, and whether its storage waits in the host's memory (of none by default)."""

    levels: tuple[str, ...]
    offloaded: tuple[bool, ...] = ()

    @classmethod
    def least(cls, blocks: int, offload: bool) -> Mix:
        """What takes the least memory. The last block's backward comes at once, so that its storage stays."""
        return cls(("bottleneck",) * blocks, (*(offload for _ in range(blocks - 1)), False))


def cheapest_mix(shape: NetworkShape, optimizer: Optimizer, device: str, budget: int, offload: bool) -> Mix:
    """Within ``budget`` bytes the mix that recomputes the fewest multiply-adds, then offloads the least; the one that
    takes the least memory where none fits."""
    fitting = []
    for mix in mixes(len(shape.blocks), offload):
        step = training_step(shape, mix.levels, optimizer, device, mix.offloaded)
        peak = step.peak().peak
        if peak <= budget:
            fitting.append((step.recomputed, step.on_host, peak, -mix.levels.count("none"), mix))
    return min(fitting)[-1] if fitting else Mix.least(len(shape.blocks), offload)


def mixes(blocks: int, offload: bool) -> Iterator[Mix]:
    """Every way to give each block a level and, where ``offload``, each but the last block's storage a place."""
    places = list(itertools.product((False, True) if offload else (False,), repeat=blocks - 1))
    for levels in itertools.product(CHECKPOINTING_LEVELS, repeat=blocks):
        yield from (Mix(levels, (*offloaded, False)) for offloaded in places)


def _what_fits(
    peak_of: Callable[[Sequence[int]], int], budget: int, shape: Sequence[int], minimum: int
) -> tuple[int, int]:
    """The largest batch of images of this shape, and the largest square images at this batch; 0 where none fits."""
    count, channels, *size = shape
    return (
        largest(lambda number: peak_of((number, channels, *size)) <= budget, 1),
        largest(lambda side: peak_of((count, channels, side, side)) <= budget, minimum),
    )


def largest(fits: Callable[[int], bool], smallest: int) -> int:
    """The largest number for which ``fits`` is true, given that it is true up to there; 0 where ``smallest`` is not."""
    if not fits(smallest):
        return 0
    low, high = smallest, 2 * smallest
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _on_meta(name: str) -> Any:
    from ..models import create_model  # whose networks plan

    with torch.device("meta"):
        return create_model(name)


def _device(network: Any, offload: bool) -> str:
    kind: str = network.classifier.weight.device.type
    if offload and kind == "cpu":
        raise ValueError("storages are offloaded from a GPU to the host; this model is on the CPU: move it first")
    return "cuda" if offload or kind == "cuda" else "cpu"


def _with_batch(input_shape: Sequence[int], batch: int | None) -> tuple[int, ...]:
    shape = tuple(input_shape)
    for length in shape:
        check_positive("each entry of input_shape", length)
    if batch is None:
        if len(shape) == 3:
            raise ValueError(f"input_shape {shape} has no batch; give [N, C, H, W], or batch=N besides")
        return shape
    check_positive("batch", batch)
    if len(shape) != 3:
        raise ValueError(f"with batch={batch}, input_shape must be [C, H, W], got {shape}")
    return (batch, *shape)


def _dtype(dtype: torch.dtype | str) -> torch.dtype:
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found is None or found not in DTYPES.values():
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype}")
    return found


def _optimizer(name: str) -> Optimizer:
    if not isinstance(name, str) or name not in OPTIMIZERS:
        raise ValueError(f"unknown optimizer {name!r}; expected one of {', '.join(OPTIMIZERS)}")
    return OPTIMIZERS[name]
