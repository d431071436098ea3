"""The checks of constructor arguments: one line that names the argument, what was expected and what was given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

CHECKPOINTING_LEVELS = ("none", "bottleneck")


def check_positive(name: str, value: Any) -> None:
    """Raises a TypeError unless ``value`` is an int, a ValueError unless it is at least 1."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def check_drop_rate(value: Any) -> None:
    """Raises a TypeError unless ``value`` is a number, a ValueError unless it is in [0, 1)."""
    check_number("drop_rate", value)
    if not 0 <= value < 1:
        raise ValueError(f"drop_rate must be in [0, 1), got {value}")


def check_flag(name: str, value: Any) -> None:
    """Raises a TypeError unless ``value`` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def check_number(name: str, value: Any) -> None:
    """Raises a TypeError unless ``value`` is an int or a float."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a float, got {value!r}")


def check_layers(block_config: Any) -> None:
    """Raises unless ``block_config`` names the number of layers of each block, one at least."""
    if not isinstance(block_config, Sequence) or isinstance(block_config, str):
        raise TypeError(f"block_config must be a sequence of ints, got {block_config!r}")
    if not block_config:
        raise ValueError("block_config must name the layers of at least one block, got none")
    for num_layers in block_config:
        check_positive("each entry of block_config", num_layers)


def check_kernel_size(value: Any) -> None:
    """Raises unless ``value`` is an odd int: only those can keep the size of the images."""
    check_positive("kernel_size", value)
    if value % 2 == 0:
        raise ValueError(f"kernel_size must be odd, to keep the size of the images, got {value}")


def check_spatial_dims(value: Any) -> None:
    """Raises a ValueError unless ``value`` is 1, 2 or 3."""
    if isinstance(value, bool) or value not in (1, 2, 3):
        raise ValueError(f"spatial_dims must be 1, 2 or 3, got {value!r}")


def check_level(value: Any) -> None:
    """Raises a ValueError unless ``value`` is a checkpointing level."""
    if value not in CHECKPOINTING_LEVELS:
        raise ValueError(f"checkpointing must be one of {', '.join(CHECKPOINTING_LEVELS)}, got {value!r}")


def levels_of(value: Any, blocks: int) -> list[str]:
    """The checkpointing level of each of so many blocks, from one level for all of them or one per block.

    Raises a ValueError for another level or another number of levels.
    """
    levels = [value] * blocks if isinstance(value, str) else value
    if not isinstance(levels, Sequence):
        raise ValueError(f"checkpointing must be a level, or a sequence of one per block, got {value!r}")
    for level in levels:
        check_level(level)
    if len(levels) != blocks:
        raise ValueError(f"checkpointing must be one level, or one per block, {blocks}; got {len(levels)}: {value!r}")
    return list(levels)
