"""The checks of numbers on the command line: one line that names the option, what was expected and what was given."""

from __future__ import annotations

import math


def check_above_zero(option: str, number: float, below: float = math.inf) -> None:
    """Raises a ValueError unless 0 < ``number`` < ``below``."""
    if not 0 < number < below:
        limit = "" if below == math.inf else f" and below {below:g}"
        raise ValueError(f"{option}: expected a number above 0{limit}, got {number}")


def check_at_least_zero(option: str, number: float, most: float = math.inf) -> None:
    """Raises a ValueError unless 0 <= ``number`` <= ``most``."""
    if not 0 <= number <= most:
        expected = "at least 0" if most == math.inf else f"0 to {most:g}"
        raise ValueError(f"{option}: expected a number of {expected}, got {number}")
