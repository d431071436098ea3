"""The files of a data set read once by the processes of a training together, instead of by each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

from densenet_efficient.training.check import Read, find_unreadable


def find_unreadable_together(paths: Sequence[str], read: Read, process: int, processes: int) -> dict[str, str]:
    """What `find_unreadable` finds, in each process of the group.

    A machine may have a copy of its own of the data, so each reads all of them: its `processes`, of which this one is
    number `process`, each a share. Raises what reading raises, and RuntimeError where it was raised in another process,
    so that none waits for one that has failed.
    """
    paths = list(dict.fromkeys(paths))
    found: dict[str, str] = {}
    failure: Exception | None = None
    try:
        found = find_unreadable(paths[process::processes], read)
    except Exception as error:  # to be raised once the others know
        failure = error
    outcomes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, (found, failure and f"{type(failure).__name__}: {failure}"))
    if failure is not None:
        raise failure
    for rank, (_, reason) in enumerate(outcomes):
        if reason is not None:
            raise RuntimeError(f"process {rank} failed as it read the images of --data: {reason}")
    problems = {path: text for theirs, _ in outcomes for path, text in theirs.items()}
    return {path: problems[path] for path in paths if path in problems}
