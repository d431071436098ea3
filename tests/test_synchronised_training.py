"""SyncBatchNorm over processes: exactly one process's training of the whole batch, for a fraction of the exchange."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from synchronised_training import SHARES, train_whole, work
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from densenet_efficient import EfficientDenseNet
from densenet_efficient.reference import NaiveDenseNet


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What three gloo processes left."""
    folder = tmp_path_factory.mktemp("processes")
    multiprocessing.spawn(work, (folder,), nprocs=3)
    return folder


@pytest.mark.parametrize(("world_size", "checkpointing"), [(3, "none"), (3, "bottleneck"), (2, "bottleneck")])
def test_several_processes_train_as_one_does(world_size: int, checkpointing: str, results: Path) -> None:
    """Two steps in float64 on unequal shares: weights and running statistics of every process."""
    expected = train_whole(NaiveDenseNet)
    for rank in range(len(SHARES[world_size])):
        state = torch.load(results / f"{world_size}-{rank}-{checkpointing}.pt")
        assert state.keys() == expected.keys()
        for name, value in state.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


def test_what_is_exchanged(results: Path) -> None:
    """A fifth, or less, of what torch.nn.SyncBatchNorm exchanges in the naive model.

    Per norm of C channels that gives mean, inverse deviation and count, 2 C + 1 values, in the forward, and two sums
    per channel, 2 C values, in the backward (torch/nn/modules/_functions.py).
    """
    model = NaiveDenseNet(32, (6, 12, 48, 32), 64, num_classes=2)
    naive = sum(4 * (4 * norm.num_features + 1) for norm in model.modules() if isinstance(norm, nn.BatchNorm2d))
    for rank in range(3):
        sent = torch.load(results / f"bytes-{rank}.pt")
        assert naive / sum(sent) >= 5
        layers = 98
        # Each channel of a storage, each bottleneck and the stem once, forward and backward; and counts, of 8 bytes.
        storages, bottlenecks, stem = 256 + 512 + 1792 + 1920, layers * 128, 64
        assert sum(sent) == 4 * 2 * 2 * (storages + bottlenecks + stem) + 5 * 8


def test_a_process_by_itself_needs_no_group() -> None:
    torch.manual_seed(0)
    options = {"growth_rate": 4, "block_config": (2, 2), "num_init_features": 4, "num_classes": 2}
    plain = EfficientDenseNet(**options)
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(EfficientDenseNet(**options))
    synchronised.load_state_dict(plain.state_dict())
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(plain(images), synchronised(images))
    assert torch.equal(plain.eval()(images), synchronised.eval()(images))


def test_frozen_norms_of_a_block_are_of_no_group() -> None:
    model = nn.SyncBatchNorm.convert_sync_batchnorm(EfficientDenseNet(4, (2, 2), 4, num_classes=2))
    for norm in (model.features.denseblock1["denselayer1"].norm2, model.features.norm5):
        norm.eval()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        assert model(torch.randn(2, 3, 32, 32)).shape == (2, 2)
    finally:
        dist.destroy_process_group()


def test_norms_of_a_block_in_different_groups_are_refused() -> None:
    model = EfficientDenseNet(4, (2, 2), 4, num_classes=2)
    block = model.features.denseblock1
    block["denselayer1"] = nn.SyncBatchNorm.convert_sync_batchnorm(block["denselayer1"])
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)  # none that is asked to exchange
    try:
        with pytest.raises(
            ValueError, match=r"synchronised in different groups; convert all of them, by torch\.nn\.Sync"
        ):
            model(torch.randn(2, 3, 32, 32))
    finally:
        dist.destroy_process_group()
