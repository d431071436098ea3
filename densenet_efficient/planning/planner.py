"""`plan`: the memory of a network before it runs, and what fits a budget."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..argument_checks import CHECKPOINTING_LEVELS, check_positive, levels_of
from ..models import create_model
from ..summary import format_bytes, minimum_size, summarize, total_costs
from .shapes import NetworkShape, blocks_of, shape_of
from .sizes import parse_bytes
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
        shape = "x".join(map(str, self.input_shape))
        raise ValueError(
            f"a training step of {self.model} on {shape} needs {format_bytes(self.training.peak)} "
            f"at least, the budget is {format_bytes(self.budget or 0)}; remedy: "
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
        checkpointing: the levels to predict, one or one per block; with a budget they are not chosen then. The
            default without a budget are the model's own.

    Raises:
        TypeError, ValueError: an argument is of another type, unknown, or does not fit the network.
    """
    name, network = (model, _on_meta(model)) if isinstance(model, str) else (type(model).__name__, model)
    blocks = blocks_of(network)
    shape = _with_batch(input_shape, batch)
    computed = _dtype(dtype)
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"unknown optimizer {optimizer!r}; expected one of {', '.join(OPTIMIZERS)}")
    device = "cuda" if network.classifier.weight.device.type == "cuda" else "cpu"
    limit = None if budget is None else parse_bytes(budget)
    given = None if checkpointing is None else levels_of(checkpointing, len(blocks))

    def shapes(images: Sequence[int]) -> NetworkShape:
        return shape_of(network, images, computed, device)

    def step(buffers: NetworkShape, levels: Sequence[str]) -> TrainingStep:
        return TrainingStep(buffers, levels, OPTIMIZERS[optimizer], device)

    buffers = shapes(shape)
    if given is None and limit is not None:
        levels = cheapest_levels(buffers, OPTIMIZERS[optimizer], device, limit)
    else:
        levels = given or [block.checkpointing for block in blocks]
    least = given or ["bottleneck"] * len(blocks)

    def fits(images: Sequence[int]) -> bool:
        return limit is not None and step(shapes(images), least).peak().peak <= limit

    count, channels, *_ = shape
    minimum = minimum_size(network)
    training = step(buffers, levels)
    return MemoryPlan(
        name,
        shape,
        str(computed).removeprefix("torch."),
        optimizer,
        list(levels),
        training.peak(),
        inference_peak(buffers, device),
        training.stages(),
        recomputed_share(network, buffers, levels, shape),
        limit,
        None if limit is None else largest(lambda n: fits((n, *shape[1:])), 1),
        None if limit is None else largest(lambda size: fits((count, channels, size, size)), minimum),
    )


def cheapest_levels(shape: NetworkShape, optimizer: Optimizer, device: str, budget: int) -> list[str]:
    """The mix of levels that recomputes the fewest multiply-adds within ``budget`` bytes, all "bottleneck" if none."""
    fitting = []
    for levels in mixes(len(shape.blocks)):
        peak = TrainingStep(shape, levels, optimizer, device).peak().peak
        if peak <= budget:
            fitting.append((recomputed(shape, levels), peak, levels))
    return list(min(fitting)[2]) if fitting else ["bottleneck"] * len(shape.blocks)


def mixes(blocks: int) -> Iterator[tuple[str, ...]]:
    """Every way to give each block a level."""
    return itertools.product(CHECKPOINTING_LEVELS, repeat=blocks)


def recomputed(shape: NetworkShape, levels: Sequence[str]) -> int:
    """The multiply-adds that a backward recomputes; the stem follows the first block."""
    blocks = zip(shape.blocks, levels, strict=True)
    of_blocks = sum(block.recomputed for block, level in blocks if level == "bottleneck")
    return of_blocks + (shape.stem.recomputed if levels[0] == "bottleneck" else 0)


def recomputed_share(model: Any, shape: NetworkShape, levels: Sequence[str], input_shape: Sequence[int]) -> float:
    """`recomputed` as a share of a forward's multiply-adds."""
    return recomputed(shape, levels) / total_costs(summarize(model, input_shape)).multiply_adds


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
    with torch.device("meta"):
        return create_model(name)


def _with_batch(input_shape: Sequence[int], batch: int | None) -> tuple[int, ...]:
    shape = tuple(input_shape)
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
