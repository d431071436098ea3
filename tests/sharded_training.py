"""What each of the two processes of the tests of FSDP does; started by torch.multiprocessing."""

from __future__ import annotations

import os
import signal
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from synchronised_training import CONFIG, STEPS, take_steps, whole_batch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from training_cases import fit, stopping_at

from densenet_efficient import DenseBlock, EfficientDenseNet
from densenet_efficient.modules import DenseLayer
from densenet_efficient.reference import NaiveDenseNet

PARTS: dict[str, type[nn.Module] | None] = {"whole": None, "blocks": DenseBlock, "layers": DenseLayer}
if torch.__version__.startswith("2.11."):
    del PARTS["blocks"]  # it refuses every nn.ModuleDict, also one with a forward
# One epoch in which no step draws what several processes would draw otherwise than one.
WITHOUT_CHANCE = ("--trainer.max_epochs", "1", "--model.mixup", "0", "--model.drop_rate", "0")
TWO_DEVICES = ("--trainer.devices", "2")
COMMON = (*TWO_DEVICES, "--trainer.max_epochs", "2", "--model.head_epochs", "1")
DDP, FSDP = ("--trainer.strategy", "ddp"), ("--trainer.strategy", "fsdp")
FULL = StateDictOptions(full_state_dict=True)


def make_sharded(parts: str, synchronised: bool) -> EfficientDenseNet:
    """The start of `train_whole`, divided between the processes: each of the parts by itself, then the rest."""
    torch.manual_seed(0)
    start = NaiveDenseNet(**CONFIG).double().state_dict()
    model = EfficientDenseNet(**CONFIG).double()
    model.load_state_dict(start)
    if synchronised:
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    mesh, kind = init_device_mesh("cpu", (2,)), PARTS[parts]
    for module in list(model.modules()):
        if kind is not None and isinstance(module, kind):
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def train_sharded(rank: int, parts: str) -> dict[str, Any]:
    """What is left after steps on the process's share, and what was said."""
    synchronised = parts == "whole"  # otherwise norms run by themselves, and torch's own refuses a CPU
    model = make_sharded(parts, synchronised)
    own = [parameter.to_local() for parameter in model.parameters() if isinstance(parameter, DTensor)]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        if synchronised:
            take_steps(model, rank, 2)
        else:
            take_whole_batch(model)
    return {
        "state": get_model_state_dict(model, options=FULL),
        "share": sum(part.numel() for part in own),
        "said": [str(warning.message) for warning in said if "layer by layer" in str(warning.message)],
    }


def take_whole_batch(model: nn.Module) -> None:
    """The steps of `train_whole`, in each process."""
    images, labels = whole_batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(STEPS):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()


def evaluate_between_steps(model: nn.Module) -> list[Tensor]:
    """Logits before and after steps with frozen norms, whose buffers say nothing of the weights' change."""
    images, labels = whole_batch()
    model.eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    logits = []
    for _ in range(3):
        for _ in range(2):  # the second time with what the first has prepared
            with torch.no_grad():
                logits.append(model(images).clone())
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    return logits


def run_commands(rank: int, folder: Path) -> None:
    """Runs of fit by DDP and by FSDP, and one by FSDP that is told to stop in one process, then continued."""
    images = folder / "images"
    assert fit(images, folder / "ddp", *COMMON, *DDP) == 0
    assert fit(images, folder / "fsdp", *COMMON, *FSDP, "--report", "true") == 0
    with pytest.MonkeyPatch.context() as patch:
        stopping_at(patch, 2, lambda trainer: signal.raise_signal(signal.SIGTERM) if rank == 1 else None)
        assert fit(images, folder / "stopped", *COMMON, *FSDP) == 128 + signal.SIGTERM
    assert fit(images, folder / "stopped", *COMMON, *FSDP, "--ckpt_path", "last") == 0
    synchronised = (*TWO_DEVICES, "--trainer.sync_batchnorm", "true", *WITHOUT_CHANCE)
    for name, strategy in (("ddp", DDP), ("fsdp", FSDP)):
        assert fit(images, folder / f"synchronised-{name}", *synchronised, *strategy) == 0


def work(rank: int, folder: Path) -> None:
    """Both processes train the same models together, then run the commands; results go into `folder`."""
    torch.set_num_threads(1)
    rendezvous = f"file://{folder / 'rendezvous'}"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2, timeout=timedelta(seconds=120))
    for parts in PARTS:
        torch.save(train_sharded(rank, parts), folder / f"{parts}-{rank}.pt")
    torch.save(evaluate_between_steps(make_sharded("whole", synchronised=False)), folder / f"logits-{rank}.pt")
    # As torchrun sets them; the group that Lightning would make is there already.
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "NODE_RANK": "0"}
    run_commands(rank, folder)
    dist.destroy_process_group()
