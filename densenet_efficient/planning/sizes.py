"""Counts and bytes as people read and write them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
NUMBER = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", re.ASCII)


def parse_bytes(value: int | str) -> int:
    """Bytes from a number or from text such as "8GiB" (2^30) or "8 GB" (10^9).

    Raises:
        TypeError: it is neither an int nor text.
        ValueError: the text is no positive number with a known unit.
    """
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise TypeError(f"budget must be an int (bytes) or a str such as '8GiB', got {value!r}")
    match = NUMBER.fullmatch(str(value))
    unit = match and UNITS.get(match[2].upper())
    count = int(Fraction(match[1]) * unit) if match and unit else 0
    if count < 1:
        raise ValueError(f"budget {value!r} is no positive number of bytes; expected one such as '8GiB' or '500MB'")
    return count


def format_count(count: float) -> str:
    """1234567 as `1.23 M`."""
    return _format_scaled(count, 1000, ("", "k", "M", "G", "T", "P"), digits=2)


def format_bytes(count: float) -> str:
    """1234567 as `1.2 MiB`."""
    return _format_scaled(count, 1024, ("B", "KiB", "MiB", "GiB", "TiB", "PiB"), digits=1)


def _format_scaled(value: float, base: int, units: Sequence[str], digits: int) -> str:
    if not value:
        return "0"
    exponent = 0
    while value >= 1000 and exponent + 1 < len(units):
        value, exponent = value / base, exponent + 1
    return f"{value:.{digits}f} {units[exponent]}".rstrip()
