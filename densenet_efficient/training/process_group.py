"""How a process leaves the training of several."""

from __future__ import annotations

import time

import torch.distributed as dist

SECONDS_TO_LET_GO = 0.2  # takes microseconds, but for that another thread must have run


def let_go_of_exchanged() -> None:
    """Wait until the threads that exchange tensors on CPUs hold none any more; for the end of a process.

    They drop a tensor after its exchange, under Python's lock. Where Python has begun to end, the process is aborted
    instead (https://github.com/pytorch/pytorch/issues/190489), so that a run that is done would count as failed.
    """
    if dist.is_available() and dist.is_initialized():
        time.sleep(SECONDS_TO_LET_GO)
