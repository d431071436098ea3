"""The memory of one step, moment by moment: what lives while each stage runs forward, and backward.

The moments are those where `dense_block.py` and `stem.py` hold the most:

- a stage's forward: its input, its storage, one bottleneck, and the exit's pooled activations and output; in a native
  inference of storage, bottleneck and pooled activations no more than those of the few images that threads work on,
  and of the stem its output alone;
- a stage's backward: what every stage up to it has saved, the gradient of its output, the gradient buffer of its
  storage, and besides either the exit's pooled activations, or a recomputed bottleneck (in the first block of a quarter
  of the images) and its gradient, or the gradient of its input;
- the stem's backward: the convolution's output and its gradient, then its gradient and torch's workspace for the images
  that it takes at a time;
- the optimizer's step: no activations, but all gradients.

A storage that waits in the host's memory leaves while the next stage runs forward, and comes back while that runs
backward.

Of the vectors beside maps (statistics, logits) nothing is counted, nor the kernels' tiles: they do not grow with the
batch, but for the logits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from ..kernels import cpu
from .shapes import BlockShape, NetworkShape

BYTES_OF_A_VISIT = 2**20  # of the native inference: kBytesOfAVisit


@dataclass(frozen=True)
class Memory:
    """Bytes that live at one moment."""

    weights: int
    gradients: int
    optimizer_state: int
    saved_activations: int  # with the images
    workspace: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer_state + self.saved_activations + self.workspace


@dataclass(frozen=True)
class Peak:
    """The moment of a step at which the most memory lives."""

    moment: str  # "denseblock1, backward"
    memory: Memory

    @property
    def peak(self) -> int:
        """Bytes."""
        return self.memory.total


@dataclass(frozen=True)
class StageMemory:
    """What a stage owns in a training step, its largest workspace, and all that lives at that moment."""

    name: str
    checkpointing: str | None  # None of the head
    own: Memory
    peak: int


@dataclass(frozen=True)
class Optimizer:
    """What an optimizer keeps, in copies of the parameters, and what its step needs besides."""

    copies: int
    temporaries: int  # copies of one parameter (CPU), or of all of them (GPU), while it steps


OPTIMIZERS = {
    "sgd": Optimizer(0, 0),
    "sgd-momentum": Optimizer(1, 0),
    "rmsprop": Optimizer(1, 1),
    "adam": Optimizer(2, 2),
    "adamw": Optimizer(2, 2),
}


@dataclass(frozen=True)
class Moment:
    """What lives besides weights and optimizer state while ``stage`` does something."""

    stage: str
    action: str
    gradients: int
    saved: int
    workspace: int


class TrainingStep:
    """The moments of a training step, with one level per block, and its storage here or, ``offloaded``, on the host.

    ``saved_layers``: of how many layers of each block, the last ones, the bottlenecks are saved.
    """

    def __init__(
        self,
        shape: NetworkShape,
        levels: Sequence[str],
        optimizer: Optimizer,
        device: str,
        offloaded: Sequence[bool],
        saved_layers: Sequence[int],
    ) -> None:
        self.shape = shape
        self.levels = list(levels)
        self.offloaded = list(offloaded) or [False] * len(self.levels)
        self.saved_layers = list(saved_layers)
        self.optimizer = optimizer
        self.device = device
        stem = shape.stem
        self.images = stem.images + stem.cast
        self.stem_saves = stem.conv_out if self.levels[0] == "none" else 0
        self.weights = sum(parameters.weights for parameters in shape.every_parameters)
        self.gradients = sum(parameters.gradients for parameters in shape.every_parameters)

    @property
    def recomputed(self) -> int:
        """The multiply-adds that a backward recomputes; the stem follows the first block."""
        blocks = zip(self.shape.blocks, self.saved_layers, strict=True)
        of_blocks = sum(sum(block.recomputed[: block.layers - saved]) for block, saved in blocks)
        return of_blocks + (self.shape.stem.recomputed if self.levels[0] == "bottleneck" else 0)

    @property
    def activation_peak(self) -> int:
        """Bytes: the most activations and workspace that live at one moment."""
        return max(moment.saved + moment.workspace for moment in self.moments())

    def saves(self, index: int) -> int:
        """Bytes that a block keeps for its backward, here or on the host."""
        block = self.shape.blocks[index]
        return block.storage + block.masks + block.bottleneck * self.saved_layers[index]

    def away(self, index: int) -> int:
        """Those that wait on the host."""
        return self.shape.blocks[index].storage if self.offloaded[index] else 0

    @property
    def on_host(self) -> int:
        """Bytes of all storages that wait there."""
        return sum(map(self.away, range(len(self.levels))))

    def moments(self) -> Iterator[Moment]:
        """In the order of the step."""
        blocks, stem = self.shape.blocks, self.shape.stem
        saved = self.images
        yield Moment("stem", "forward", 0, saved, stem.conv_out + max(stem.forward_workspace, stem.out))
        saved += self.stem_saves
        for index, block in enumerate(blocks):
            saved += self.saves(index)
            scratch = 0 if self.saved_layers[index] else block.bottleneck
            yield Moment(block.name, "forward", 0, saved, block.input + scratch + block.pooled + block.out)
            saved -= self.away(index - 1) if index else 0
        gradients = self.shape.head.gradients
        for index, block in reversed(list(enumerate(blocks))):
            gradients += block.parameters.gradients
            saved += self.away(index - 1) if index else 0
            yield Moment(block.name, "backward", gradients, saved, self._backward_workspace(index))
            saved -= self.saves(index)
        gradients += stem.parameters.gradients
        recomputed = stem.conv_out - self.stem_saves
        unfolding = recomputed + stem.forward_workspace if recomputed else 0
        pooling, convolution = recomputed + stem.conv_out, stem.conv_out + stem.backward_workspace
        yield Moment("stem", "backward", gradients, saved, stem.out + max(unfolding, pooling, convolution))
        yield Moment("optimizer", "step", gradients, self.images, self._optimizer_workspace())

    def _backward_workspace(self, index: int) -> int:
        block = self.shape.blocks[index]
        saved = self.saved_layers[index]
        scratch = block.bottleneck if saved else block.gradient_part
        if saved < block.layers:
            scratch += block.bottleneck_part
        scratch += block.dropped
        return block.out + block.storage + max(block.pooled, scratch, block.input)

    def _optimizer_workspace(self) -> int:
        if self.device == "cpu":  # torch steps one parameter after the other
            return self.optimizer.temporaries * max(parameters.largest for parameters in self.shape.every_parameters)
        return min(self.optimizer.temporaries, 1) * self.gradients

    def memory(self, moment: Moment) -> Memory:
        state = self.optimizer.copies * self.gradients
        return Memory(self.weights, moment.gradients, state, moment.saved, moment.workspace)

    def peak(self) -> Peak:
        moments = [(self.memory(moment), moment) for moment in self.moments()]
        memory, moment = max(moments, key=lambda pair: pair[0].total)
        return Peak(f"{moment.stage}, {moment.action}", memory)

    def stages(self) -> list[StageMemory]:
        """The stem, each block with its transition, and the head."""
        largest: dict[str, Moment] = {}
        for moment in self.moments():
            known = largest.get(moment.stage)
            if known is None or self.memory(moment).total > self.memory(known).total:
                largest[moment.stage] = moment
        names = ["stem", *(block.name for block in self.shape.blocks)]
        blocks = range(len(self.shape.blocks))
        saved = [self.images + self.stem_saves, *(self.saves(index) - self.away(index) for index in blocks), 0]
        levels = [self.levels[0], *self.levels, None]
        stages = []
        for name, parameters, kept, level in zip(
            [*names, "head"], self.shape.every_parameters, saved, levels, strict=True
        ):
            moment = largest.get(name, largest[names[-1]])  # the head's norm joins the last block
            state = self.optimizer.copies * parameters.gradients
            workspace = moment.workspace if name in largest else 0
            own = Memory(parameters.weights, parameters.gradients, state, kept, workspace)
            stages.append(StageMemory(name, level, own, self.memory(moment).total))
        return stages


def inference_peak(shape: NetworkShape, device: str) -> Peak:
    """The largest moment of a forward in evaluation, without gradients."""
    native = device == "cpu" and cpu.is_available()
    packed = sum(parameters.packed for parameters in shape.every_parameters) if native else 0
    weights = sum(parameters.weights for parameters in shape.every_parameters) + packed
    stem = shape.stem
    by_torch = stem.conv_out + max(stem.forward_workspace, stem.out)
    moments = {"stem": stem.cast + (stem.out if native and stem.conv_out else by_torch)}
    for block in shape.blocks:
        whole = block.storage + block.bottleneck + block.pooled
        moments[block.name] = block.input + (_scratch(block, shape.batch) if native else whole) + block.out
    stage = max(moments, key=lambda name: moments[name])
    return Peak(f"{stage}, forward", Memory(weights, 0, 0, stem.images, moments[stage]))


def _scratch(block: BlockShape, batch: int) -> int:
    """What threads hold that take a few images each through a stage, as csrc/cpu/dense_stage_inference.cpp has it."""
    image = (block.storage + block.bottleneck) // batch
    threads = torch.get_num_threads()
    at_a_time = max(min(BYTES_OF_A_VISIT // image, batch // threads), 1)
    busy = threads if -(-batch // at_a_time) >= threads else 1
    return busy * at_a_time * (image + block.pooled // batch)
