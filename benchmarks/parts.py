"""The parts of a benchmark that a command line names."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence


def parse(
    parser: argparse.ArgumentParser, parts: Iterable[str], arguments: Sequence[str]
) -> tuple[argparse.Namespace, list[str]]:
    """The options, and the parts named in front of them: all where none is. An unknown one ends the program."""
    known = list(parts)
    # Not `choices`: with them, argparse refuses its own default of no part at all.
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(known)}; default: all")
    options = parser.parse_args(arguments)
    for part in options.parts:
        if part not in known:
            parser.error(f"unknown part {part!r}; expected some of {', '.join(known)}")
    return options, options.parts or known
