"""What each process of the tests of synchronised training does; started by torch.multiprocessing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from densenet_efficient import EfficientDenseNet, EfficientDenseNet201, synchronisation
from densenet_efficient.reference import NaiveDenseNet
from densenet_efficient.training.process_group import let_go_of_exchanged

CONFIG: dict[str, Any] = {"growth_rate": 4, "block_config": (2, 3), "num_init_features": 6, "num_classes": 3}
SHARES = {2: (2, 3), 3: (2, 0, 3)}  # images of each process; together 5
STEPS = 2


def whole_batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Five float64 images [5, 3, 32, 32] of very different means, so that unequal shares matter."""
    generator = torch.Generator().manual_seed(0)
    offsets = torch.tensor([3.0, -2, 0, 10, 1], dtype=torch.float64)[:, None, None, None]
    images = torch.randn(5, 3, 32, 32, dtype=torch.float64, generator=generator) + offsets
    return images, torch.tensor([0, 1, 2, 1, 0])


def train_whole(factory: Any, **options: Any) -> dict[str, torch.Tensor]:
    """The state after steps of one process on the whole batch."""
    torch.manual_seed(0)
    model = factory(**CONFIG, **options).double()
    images, labels = whole_batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(STEPS):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    return model.state_dict()


def train_share(rank: int, world_size: int, group: dist.ProcessGroup | None, checkpointing: str) -> dict[str, Any]:
    """The same as one of several processes."""
    torch.manual_seed(0)
    start_state = NaiveDenseNet(**CONFIG).double().state_dict()
    plain = EfficientDenseNet(**CONFIG, checkpointing=checkpointing).double()
    plain.load_state_dict(start_state)
    model = DistributedDataParallel(plain, process_group=group)
    nn.SyncBatchNorm.convert_sync_batchnorm(plain, group)  # in place, and now: on the CPU DDP refuses such norms
    take_steps(model, rank, world_size)
    state: dict[str, Any] = model.module.state_dict()
    return state


def take_steps(model: nn.Module, rank: int, world_size: int) -> None:
    """Train on the share of a process; gradients are averaged over the processes."""
    start = sum(SHARES[world_size][:rank])
    images, labels = (tensor[start : start + SHARES[world_size][rank]] for tensor in whole_batch())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels, reduction="sum") / 5
        (loss * world_size).backward()
        optimizer.step()


@contextmanager
def counted_bytes() -> Iterator[list[int]]:
    """Bytes that this process gives to others, one entry per exchange."""
    sent: list[int] = []
    gather, reduce = synchronisation.all_gather, synchronisation.all_reduce

    def counted(function: Any, payload: int) -> Any:
        def call(*tensors: Any, **options: Any) -> Any:
            sent.append(tensors[payload].numel() * tensors[payload].element_size())
            return function(*tensors, **options)

        return call

    synchronisation.all_gather, synchronisation.all_reduce = counted(gather, 1), counted(reduce, 0)
    try:
        yield sent
    finally:
        synchronisation.all_gather, synchronisation.all_reduce = gather, reduce


def exchanged_by_densenet201() -> list[int]:
    model = nn.SyncBatchNorm.convert_sync_batchnorm(EfficientDenseNet201(num_classes=2))
    with counted_bytes() as sent:
        model(torch.randn(1, 3, 32, 32)).sum().backward()
    return sent


def work(rank: int, folder: Path) -> None:
    """All three processes train together, then the first two; results go into `folder`."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=3)
    pair = dist.new_group([0, 1])
    for checkpointing in ("none", "bottleneck"):
        torch.save(train_share(rank, 3, None, checkpointing), folder / f"3-{rank}-{checkpointing}.pt")
    if rank < 2:
        torch.save(train_share(rank, 2, pair, "bottleneck"), folder / f"2-{rank}-bottleneck.pt")
    torch.save(exchanged_by_densenet201(), folder / f"bytes-{rank}.pt")
    let_go_of_exchanged()
    dist.destroy_process_group()
