"""What a command says of options that its parser refuses."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import pairwise

REFUSED = 2  # the exit status


def say_what_is_wrong(command: str, arguments: Sequence[str], error: Exception) -> int:
    """Print one line, and return the exit status."""
    configs = [value for flag, value in pairwise(arguments) if flag == "--config"]
    where = f" (in {', '.join(configs)}, or on the command line)" if configs else ""
    reason = " ".join(str(error).split())
    print(f"error: {reason}{where}; densenet-efficient {command} --help lists the options", file=sys.stderr)
    return REFUSED
