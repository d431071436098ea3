"""One of two processes that exchange tensors until they end: `python exchanging.py RENDEZVOUS RANK`."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist

from densenet_efficient.training.process_group import let_go_of_exchanged


def main() -> None:
    rendezvous, rank = sys.argv[1], int(sys.argv[2])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    for _ in range(3):
        dist.all_reduce(torch.ones(1))
        dist.all_gather([torch.empty(1), torch.empty(1)], torch.ones(1))
    number = torch.tensor(rank)
    dist.all_reduce(number)
    int(number)
    let_go_of_exchanged()


if __name__ == "__main__":
    main()
