"""One of three processes that train together over gloo: RANK FOLDER VICTIM, where the victim dies within a step.

Rank 0 writes a checkpoint after each step; a start finds the last one. The state at the end goes into FOLDER.
"""

import datetime
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
import torch.nn.functional as F
from synchronised_training import CONFIG, SHARES, whole_batch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from densenet_efficient import EfficientDenseNet, synchronisation
from densenet_efficient.files import atomic_write
from densenet_efficient.training.process_group import let_go_of_exchanged

STEPS, FATAL_STEP, PROCESSES = 6, 3, 3


def die_after(exchanges):
    """Makes this process kill itself at an exchange of statistics."""
    reduce = synchronisation.all_reduce
    left = [exchanges]

    def exchange(*tensors, **options):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return reduce(*tensors, **options)

    synchronisation.all_reduce = exchange


def main():
    rank, folder, victim = int(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / f'rendezvous-{victim}'}",
        rank=rank,
        world_size=PROCESSES,
        timeout=datetime.timedelta(seconds=30),
    )
    torch.manual_seed(0)
    plain = EfficientDenseNet(**CONFIG).double()
    model = DistributedDataParallel(plain)
    nn.SyncBatchNorm.convert_sync_batchnorm(plain)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    first, path = 0, folder / "last.pt"
    if path.exists():
        saved = torch.load(path)
        first = saved["step"]
        plain.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
    dist.barrier()
    start = sum(SHARES[PROCESSES][:rank])
    images, labels = (tensor[start : start + SHARES[PROCESSES][rank]] for tensor in whole_batch())
    for step in range(first, STEPS):
        if rank == victim and step == FATAL_STEP:
            die_after(3)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels, reduction="sum") / 5
        (loss * PROCESSES).backward()
        optimizer.step()
        if rank == 0:
            with atomic_write(path) as file:
                state = {"step": step + 1, "model": plain.state_dict(), "optimizer": optimizer.state_dict()}
                torch.save(state, file)
    torch.save(plain.state_dict(), folder / f"end-{rank}.pt")
    let_go_of_exchanged()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
