"""From samples to batches: each epoch's order and each image's augmentation follow from the seed alone.

So nothing about them needs to be saved: a run that is continued, in the middle of an epoch too, sees what it would have
seen, with any number of workers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from densenet_efficient.training.preprocessing import Transform
from densenet_efficient.training.samples import Samples
from densenet_efficient.training.signals import delayed_signals

Draw = tuple[int, int]  # the index of a sample, and the seed of its augmentation
SEED_RANGE = 2**62


class LabelledImages(Dataset[tuple[Tensor, Tensor]]):
    """Inputs and labels. `read` makes an image of a source, such as a path."""

    def __init__(self, samples: Samples, read: Transform, transform: Transform) -> None:
        self.samples, self.read, self.transform = samples, read, transform

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int | Draw) -> tuple[Tensor, Tensor]:
        if isinstance(index, int):
            return self.transform(self.read(self.samples.sources[index])), self.samples.labels[index]
        index, seed = index
        with torch.random.fork_rng(devices=()):
            torch.default_generator.manual_seed(seed)
            return self[index]


class EpochSampler(Sampler[Draw]):
    """A random order per epoch, drawn from the seed and the epoch; every process takes its share of it.

    Without `weights` each sample comes once per epoch; with them samples are drawn with replacement, in proportion.
    Only as many are drawn as fill whole batches of all processes: a last batch of one image would have no variance for
    the batch normalization.
    """

    def __init__(
        self, count: int, batch_size: int, seed: int, weights: Tensor | None = None, rank: int = 0, world_size: int = 1
    ) -> None:
        self.count, self.seed, self.weights = count, seed, weights
        self.rank, self.world_size = rank, world_size
        self.share = count // (batch_size * world_size) * batch_size  # of each process
        if self.share == 0:
            raise ValueError(
                f"expected at least one batch of {batch_size} images to train on, in each of {world_size} processes, "
                f"got {count} images; lower --data.batch_size"
            )
        self.epoch = 0
        self.start = 0  # how many of the epoch's samples to leave out

    def set_epoch(self, epoch: int) -> None:
        """Lightning calls this before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.share

    def __iter__(self) -> Iterator[Draw]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        if self.weights is None:
            order = torch.randperm(self.count, generator=generator)
        else:
            order = torch.multinomial(self.weights, self.count, replacement=True, generator=generator)
        seeds = torch.randint(SEED_RANGE, (self.count,), generator=generator)
        mine = slice(self.rank, self.share * self.world_size, self.world_size)
        yield from list(zip(order[mine].tolist(), seeds[mine].tolist(), strict=True))[self.start :]


class ReadingLoader(DataLoader[Any]):
    """A loader whose processes begin undisturbed: signals of that moment act right after it.

    Of a handler that Python calls while it forks, what it raises is lost; and a process that is new dies of the signal.
    """

    def __iter__(self) -> Any:
        with delayed_signals():
            return super().__iter__()


class TrainingLoader(ReadingLoader):
    """A loader that Lightning can save and restore in the middle of an epoch."""

    def __init__(self, dataset: LabelledImages, sampler: EpochSampler, batch_size: int, **kwargs: Any) -> None:
        super().__init__(dataset, batch_size, sampler=sampler, **kwargs)
        self.epoch_sampler = sampler
        self.given = 0  # batches of this epoch
        self.restored: dict[str, int] = {}

    def __iter__(self) -> Any:
        """Starts at the first request, when Lightning has told the sampler its epoch."""
        goes_on = self.restored.get("epoch") == self.epoch_sampler.epoch
        self.given = self.restored["given"] if goes_on else 0
        self.restored = {}
        self.epoch_sampler.start = self.given * (self.batch_size or 1)
        for batch in super().__iter__():
            self.given += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch_sampler.epoch, "given": self.given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.restored = state
