"""What each process draws of an epoch: its images, in the order of the batches, and the seeds of their augmentation."""

from __future__ import annotations

import pytest
import torch

from densenet_efficient.training.loading import EpochSampler, LabelledImages, TrainingLoader
from densenet_efficient.training.samples import Samples


def drawn(epoch: int = 0, batch_size: int = 2, seed: int = 3, **options: int) -> list[tuple[int, int]]:
    sampler = EpochSampler(11, batch_size, seed, **options)
    sampler.set_epoch(epoch)
    return list(sampler)


@pytest.mark.parametrize("epoch", [0, 5])
def test_together_the_batches_of_all_processes_are_one_of_their_size(epoch: int) -> None:
    shares = [drawn(epoch, rank=rank, world_size=2) for rank in (0, 1)]
    together = [one for pair in zip(*shares, strict=True) for one in pair]
    assert together == drawn(epoch, batch_size=4)


def test_no_augmentation_comes_twice() -> None:
    every = [seed for epoch in range(3) for _, seed in drawn(epoch)]
    every += [seed for _, seed in drawn(seed=4)]
    assert len(every) == len(set(every))


def test_weights_are_those_of_the_images() -> None:
    sampler = EpochSampler(4, 4, 0, torch.tensor([0.0, 1.0, 0.0, 3.0]))
    assert {index for index, _ in sampler} <= {1, 3}


def test_weighted_draws_follow_from_the_seed_alone() -> None:
    sampler = EpochSampler(11, 2, 3, torch.arange(1.0, 12.0))
    torch.manual_seed(1)
    first = list(sampler)
    torch.manual_seed(2)
    assert list(sampler) == first


def test_what_an_interrupted_epoch_has_given_is_left_out_once() -> None:
    images = LabelledImages(Samples(torch.arange(6.0), torch.zeros(6)), lambda source: source, lambda image: image)
    loader = TrainingLoader(images, EpochSampler(6, 2, seed=0), batch_size=2)
    loader.load_state_dict({"epoch": 0, "given": 2})
    assert [len(list(loader)), len(list(loader))] == [1, 3]
