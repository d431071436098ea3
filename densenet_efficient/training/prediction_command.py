"""The command predict: its options, on the command line or in YAML files."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

from jsonargparse import ArgumentError, ArgumentParser
from jsonargparse.typing import NonNegativeInt, PositiveInt

from densenet_efficient.training.command_errors import say_what_is_wrong
from densenet_efficient.training.signals import handled_by


def run_predict(arguments: Sequence[str]) -> int:
    """Run it with the arguments that follow it on the command line, and return its exit status."""
    try:
        given = build_parser().parse_args(arguments)
    except ArgumentError as error:
        return say_what_is_wrong("predict", arguments, error)
    from lightning_fabric.utilities.exceptions import MisconfigurationException

    from densenet_efficient.training.prediction import predict
    from densenet_efficient.training.quiet import quieten_lightning

    quieten_lightning()
    options = given.as_dict()
    del options["config"]
    try:
        with handled_by(_stop):
            predict(**options)
    except Stopped as stop:
        print(f"Interrupted{'' if given.output is None else '; the same command goes on'}", file=sys.stderr)
        return stop.status
    except MisconfigurationException as error:  # such as of an accelerator that is not there
        raise ValueError(str(error)) from error
    return 0


class Stopped(BaseException):
    """The command was told to stop. The status is the shell's for the signal."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.status = 128 + number


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    """At once. By itself Lightning's `predict` goes on at a SIGTERM, and at Ctrl-C ends the process without a word."""
    raise Stopped(number)


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(
        "densenet-efficient predict",
        description="Classify images with a checkpoint of fit, which holds all that is needed besides.",
        exit_on_error=False,
    )
    add = parser.add_argument
    add("--config", action="config", help="a YAML file with any of these options")
    add("--checkpoint", type=Path, required=True, metavar="FILE", help="written by fit")
    add("inputs", type=Path, nargs="+", metavar="INPUT", help="an image, a folder of images, or a CSV table of paths")
    add("--output", type=Path, metavar="CSV", help="write all probabilities there; what it holds is not computed again")
    views = "average over the image alone, its mirror image too, or all 8 symmetries"
    add("--views", choices=("none", "mirror", "dihedral"), default="none", help=views)
    add("--batch_size", type=PositiveInt, default=32, help="images at once")
    add("--path_column", default="path", help="of a CSV table")
    root = "what the paths of a CSV table are relative to; the table's folder if not given"
    add("--root", type=Path, metavar="FOLDER", help=root)
    add("--num_workers", type=NonNegativeInt, default=0, help="processes that read images")
    add("--accelerator", default="auto", help="auto, cpu or gpu")
    add("--precision", default="32-true", help="such as 32-true, bf16-mixed, 16-mixed")
    bad = "stop at a file that is no undamaged image, or name and leave it out"
    add("--bad_files", choices=("refuse", "skip"), default="refuse", help=bad)
    return parser
