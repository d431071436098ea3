"""What a command says of options that its parser refuses."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from itertools import pairwise

REFUSED = 2  # the exit status
# Of jsonargparse's messages.
KEY = re.compile(r'Parser key "([\w.]+)":')
OF_A_GROUP = re.compile(r"Group '([\w.]+)' does not accept option '([\w.]+)'")
OF_NOTHING = re.compile(r"^Option '([\w.]+)' is not accepted")
OF_A_CLASS = re.compile(r"given class_path '(?:\w+\.)*(\w+)': Option '([\w.]+)' is not accepted")
MISSING = re.compile(r"given class_path '(?:\w+\.)*(\w+)': the following arguments are required: (\w+)")
NO_CLASS = re.compile(
    r"Expected a dot import path string: (\w+)"
    r"|given class_path '([\w.]+)': (?:No module named|module '[\w.]+' has no attribute)"
)
OTHER_CLASS = re.compile(r"Import path ([\w.]+) does not correspond to a subclass of (\w+)")
REQUIRED = re.compile(r"^the following arguments are required: (.+)")
VALUE = re.compile(r"(?:Got value|Given value): (.+?)(?= - Expected|$)")
KIND = re.compile(r"Expected an? (?:<class '(?:\w+\.)*(\w+)'>|typing\.Literal\[(.+?)\])|Not of type (\w+)")

POSITIONAL = {"inputs": "INPUT"}  # of predict; all else are options
WORDS = {
    "NoneType": "null",
    "PositiveInt": "a whole number above 0",
    "NonNegativeInt": "a whole number of at least 0",
}


def say_what_is_wrong(command: str, arguments: Sequence[str], error: Exception) -> int:
    """Print one line, and return the exit status."""
    configs = [value for flag, value in pairwise(arguments) if flag == "--config"]
    where = f" (in {', '.join(configs)}, or on the command line)" if configs else ""
    reason = in_plain_words(" ".join(str(error).split()))
    print(f"error: {reason}{where}; densenet-efficient {command} --help lists the options", file=sys.stderr)
    return REFUSED


def in_plain_words(reason: str) -> str:
    """What jsonargparse says of a name or a value, as it is on the command line; other messages as they are."""
    option = "--" + ".".join(KEY.findall(reason))
    if found := OF_A_GROUP.search(reason):
        return f"--{found[1]}.{found[2]}: there is no such option"
    if found := OF_NOTHING.search(reason):
        return f"--{found[1]}: there is no such option"
    if found := OF_A_CLASS.search(reason):
        return f"{option}.{found[2]}: {found[1]} has no such option"
    if found := MISSING.search(reason):
        return f"{option}.{found[2]}: {found[1]} needs it"
    if found := NO_CLASS.search(reason):
        return f"{option} {found[1] or found[2]}: there is no such class"
    if found := OTHER_CLASS.search(reason):
        return f"{option} {found[1]}: expected a subclass of {found[2]}"
    if found := REQUIRED.search(reason):
        names = [POSITIONAL.get(name, f"--{name}") for name in found[1].split(", ")]
        return f"the following arguments are required: {', '.join(names)}"
    if "instantiatable class" in reason:
        return f"{option}: name the kind first, the options of its kind after it"
    *_, innermost = KEY.split(reason)
    value = VALUE.search(innermost)
    kinds = dict.fromkeys(map(_kind, KIND.findall(innermost, 0, value.start() if value else len(innermost))))
    if not kinds:
        return reason
    return f"{option}: expected {' or '.join(kinds)}" + (f", got {value[1]}" if value else "")


def _kind(found: tuple[str, str, str]) -> str:
    name, choices, restricted = found
    return f"one of {choices}" if choices else WORDS.get(restricted or name, restricted or name)
