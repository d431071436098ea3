"""The largest batch whose training fits into the memory, from what smaller batches take."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from densenet_efficient.measure import MIB, peak_memory
from densenet_efficient.models import EfficientDenseNet

PROBES = (4, 12)  # batches that are measured to see what one more image takes


def largest_batch(measure: Callable[[int], int], budget: int, images: int = sys.maxsize) -> tuple[int, int]:
    """The largest batch whose peak, as `measure` gives it, is at most `budget` bytes, and this peak; of all `images` at
    most.

    Memory grows in proportion to the batch, so that two probes foretell it; the answer is then measured itself, and
    lowered as long as it does not hold. Raises ValueError if there are less than two images, or not even two fit.
    """
    if images < 2:
        raise ValueError(
            f"--data: expected at least 2 images to train on for each process, so that a batch has a variance, got "
            f"{images}; add images, or lower --trainer.devices"
        )
    smaller, larger = PROBES
    low, high = measure(smaller), measure(larger)
    per_image = max((high - low) / (larger - smaller), 1.0)
    batch = min(int(smaller + (budget - low) / per_image), images)
    while batch >= 2:
        peak = measure(batch)
        if peak <= budget:
            return batch, peak
        batch = min(batch - 1, int(batch - (peak - budget) / per_image))
    raise ValueError(
        f"not even 2 images fit into {budget / MIB:.0f} MiB: {smaller} take {low / MIB:.0f} MiB, and one more "
        f"{per_image / MIB:.1f} MiB; lower --data.image_size, or take a smaller --model.network"
    )


def measure_training(
    model: EfficientDenseNet, input_shape: tuple[int, int, int], device: str, dtype: str, states: int
) -> Callable[[int], int]:
    """Peak bytes of a training step by batch, each in a fresh process.

    `states` counts the copies of the parameters that optimizer and averaging keep besides.
    """
    parameters = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    factory = f"{EfficientDenseNet.__module__}:{EfficientDenseNet.__qualname__}"

    def measure(batch: int) -> int:
        peak = peak_memory(factory, model.config, input_shape, batch, device=device, dtype=dtype)
        return peak + states * parameters

    return measure


def available_memory(device: str) -> int:
    """Bytes that are free now: of the GPU, or of the machine, or of what a container or a job may take of it."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")) * 1024
    return min([free, *left_in_control_groups()])


def left_in_control_groups(root: Path = Path("/")) -> Iterator[int]:
    """Bytes that each limited control group (Linux's cgroup v2) of this process leaves it."""
    groups = root / "proc/self/cgroup"
    own = [line[3:] for line in groups.read_text().splitlines() if line.startswith("0::")] if groups.exists() else []
    for name in own:
        top = root / "sys/fs/cgroup"
        group = top / name.lstrip("/")
        for folder in (group, *group.parents):
            limit = folder / "memory.max"
            if folder.is_relative_to(top) and limit.exists() and limit.read_text().strip() != "max":
                cached = re.search(r"^inactive_file (\d+)$", (folder / "memory.stat").read_text(), re.MULTILINE)
                taken = int((folder / "memory.current").read_text()) - (int(cached[1]) if cached else 0)
                yield int(limit.read_text()) - taken
