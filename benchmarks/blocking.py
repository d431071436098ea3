"""`python -m benchmarks.blocking`: what visiting layers in groups would save of a training step's memory traffic.

Computed from the shapes, not measured. Today each layer reads all channels before it: once in the forward, and in the
backward once with their gradient, which is read and written. A group of layers could share these passes over the
channels older than the group. In exchange a partial bottleneck is written and read once more in the forward, and the
bottleneck and its gradient are read once more in the backward. Each block takes the group size that moves least.
"""

from __future__ import annotations

from dataclasses import dataclass

LAYERS = {"densenet121": (6, 12, 24, 16), "densenet201": (6, 12, 48, 32)}
FIRST_SIDE, FIRST_CHANNELS, GROWTH, BOTTLENECK = 56, 64, 32, 128  # of 224x224 images
PASSES = 4  # over older channels: x forward, x backward, the gradient read and written
OWN = 6 * BOTTLENECK + 5 * GROWTH  # what a layer moves of its bottleneck and its slot, forward and backward
EXTRA = 4 * BOTTLENECK  # what a layer moves more in a group
STEM = 9 * 64 * 112**2  # its convolution's output: written, read twice; then read, gradient, projection, convolution


@dataclass(frozen=True)
class Block:
    """One dense block: its layers, its input's channels, its pixels per image."""

    layers: int
    inputs: int
    pixels: int

    @property
    def channels(self) -> int:
        return self.inputs + self.layers * GROWTH

    def moved(self, group: int) -> int:
        """Elements per image of a forward and a backward, the block's exit included, in groups of this size."""
        older = 0
        for layer in range(self.layers):
            first = layer // group * group  # of the layer's group, which passes over the channels before it once
            own_channels = (layer - first) * GROWTH
            older += PASSES * (own_channels + (self.inputs + first * GROWTH if layer == first else 0))
        exit_and_input = 4 * self.channels + 4 * self.inputs
        return self.pixels * (older + self.layers * (OWN + (EXTRA if group > 1 else 0)) + exit_and_input)

    def best_group(self) -> int:
        return min(range(1, self.layers + 1), key=self.moved)

    def buffers(self, images: int, element_size: int) -> int:
        """Bytes of the storage and of its gradient."""
        return 2 * images * self.pixels * self.channels * element_size


@dataclass(frozen=True)
class Saving:
    """Bytes of a step, and those of it that blocking saves; the sizes of the groups, 1 where a block is left alone."""

    step: int
    saved: int
    groups: tuple[int, ...]


def blocks_of(model: str) -> list[Block]:
    blocks, channels, side = [], FIRST_CHANNELS, FIRST_SIDE
    for layers in LAYERS[model]:
        blocks.append(Block(layers, channels, side**2))
        channels, side = blocks[-1].channels // 2, side // 2
    return blocks


def saving(model: str, images: int, element_size: int, cache: int) -> Saving:
    """Of one step. A block whose buffers fit into ``cache`` bytes saves nothing: no pass leaves the cache."""
    step, saved, groups = STEM, 0, []
    for block in blocks_of(model):
        group = 1 if block.buffers(images, element_size) <= cache else block.best_group()
        groups.append(group)
        step += block.moved(1)
        saved += block.moved(1) - block.moved(group)
    return Saving(step * images * element_size, saved * images * element_size, tuple(groups))


COLUMNS = (
    "network",
    "dtype",
    "batch",
    "last cache",
    "bytes of a step",
    "saved",
    "of them",
    "layers in a group, by block",
)
MIB = 2**20
CARD_CACHE, CPU_CACHE = 50 * MIB, 24 * MIB  # an H100's; one that holds the buffers of blocks 3 and 4 of eight images
CASES = [(model, "bfloat16", images, CARD_CACHE) for model in LAYERS for images in (128, 256)]
CASES += [(model, dtype, 8, CPU_CACHE) for model in LAYERS for dtype in ("float32", "bfloat16")]
ELEMENT_SIZE = {"float32": 4, "bfloat16": 2}


def cells() -> list[list[str]]:
    """A row per case of `CASES`, in the order of `COLUMNS`."""
    rows = []
    for model, dtype, images, cache in CASES:
        found = saving(model, images, ELEMENT_SIZE[dtype], cache)
        amounts = [f"{amount / 1e9:.2f} GB" for amount in (found.step, found.saved)]
        groups = ", ".join(map(str, found.groups))
        row = [model, dtype, str(images), f"{cache // MIB} MiB", *amounts, f"{found.saved / found.step:.0%}", groups]
        rows.append(row)
    return rows


def share_of_time(model: str, dtype: str, images: int, seconds: float, copy_rate: float, cache: int) -> float:
    """The saved bytes at a CPU's copy rate [bytes/s], as a share of its step of ``seconds``: the most it could gain."""
    return saving(model, images, ELEMENT_SIZE[dtype], cache).saved / copy_rate / seconds


if __name__ == "__main__":
    for row in [COLUMNS, *cells()]:
        print(" | ".join(row))
