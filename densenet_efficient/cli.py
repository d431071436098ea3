"""The command line: densenet-efficient fit, test, predict, summary, visualize and others.

What is heavier than the package itself is imported by the command that needs it, so that --help answers at once.
"""

from __future__ import annotations

import argparse
import os
import pickle
import select
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from densenet_efficient import __version__
from densenet_efficient.argument_checks import CHECKPOINTING_LEVELS
from densenet_efficient.planning import plan
from densenet_efficient.planning.planner import DTYPES
from densenet_efficient.planning.timeline import OPTIMIZERS
from densenet_efficient.summary import parse_input_shape

FAILED, INTERRUPTED, UNREAD = 2, 130, 141
# Of the commands of `densenet_efficient.training`, whose options its parsers know.
CONFIGURED_COMMANDS = {
    "fit": "train a classifier on images, or continue to",
    "validate": "evaluate a checkpoint on the validation images",
    "test": "evaluate a checkpoint on the test images, and report",
    "check-data": "read every image, count the classes, find damaged and repeated files",
    "find-learning-rate": "try growing learning rates and suggest one",
    "find-batch-size": "find the largest batch whose training fits into the memory",
    "predict": "classify image files",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0, 2 after an error of one line, 130 after Ctrl-C, or its own.

    It is 141, and nothing is said, where what reads the output has seen enough, such as `head`.
    """
    given = with_underscores(sys.argv[1:] if arguments is None else arguments)
    try:
        if given and given[0] == "predict":
            from densenet_efficient.training.prediction_command import run_predict

            return run_predict(given[1:])
        if given and given[0] in CONFIGURED_COMMANDS:
            from densenet_efficient.training.cli import run

            return run(given[0], given[1:])
        options = build_parser().parse_args(given)
        return options.command(options) or 0
    except KeyboardInterrupt:
        print("Interrupted", file=sys.stderr)
        return INTERRUPTED
    except ModuleNotFoundError as error:
        remedy = "" if "pip install" in str(error) else "; pip install 'densenet-efficient[train]' brings it"
        print(f"error: {error}{remedy}", file=sys.stderr)
        return FAILED
    except (OSError, ValueError, RuntimeError, ArithmeticError, pickle.UnpicklingError) as error:
        if isinstance(error, BrokenPipeError) and reader_is_gone():
            return UNREAD
        print(f"error: {one_line(error)}", file=sys.stderr)
        return FAILED


def with_underscores(arguments: Sequence[str]) -> list[str]:
    """Options as they are called here, however they were written: --batch-size is --batch_size.

    What comes behind ``--`` are no options.
    """
    end = arguments.index("--") if "--" in arguments else len(arguments)
    return [*map(_with_underscores, arguments[:end]), *arguments[end:]]


def _with_underscores(argument: str) -> str:
    name, equals, value = argument.partition("=")
    return f"--{name[2:].replace('-', '_')}{equals}{value}" if name.startswith("--") else argument


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as every other error here."""

    def error(self, message: str) -> NoReturn:
        self.exit(FAILED, f"error: {message}; {self.prog} --help lists the options\n")


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="densenet-efficient", description="Train, use and examine memory-efficient DenseNets.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, text in CONFIGURED_COMMANDS.items():  # only for the list of commands
        commands.add_parser(name, help=text, add_help=False)
    add_summary(commands)
    add_plan(commands)
    add_doctor(commands)
    add_visualize(commands)
    return parser


def add_summary(commands: argparse._SubParsersAction[Parser]) -> None:
    parser = commands.add_parser(
        "summary",
        help="print the layers of a network",
        description="Print the stages and layers of a network.",
    )
    parser.add_argument("model", help="name of the network, such as densenet201")
    parser.add_argument("--input", type=input_shape, required=True, metavar="NxCxHxW", help="such as 4x3x224x224")
    parser.set_defaults(command=run_summary)


def add_plan(commands: argparse._SubParsersAction[Parser]) -> None:
    parser = commands.add_parser(
        "plan",
        help="predict the memory of a training step, and what fits a budget",
        description="Predict the peak memory of a training step and of an inference, stage by stage. With a budget: "
        "the cheapest levels of checkpointing that fit, the largest batch and the largest images.",
    )
    add = parser.add_argument
    add("model", help="name of the network, such as densenet201")
    add("--input", type=input_shape, required=True, metavar="NxCxHxW", help="such as 32x3x224x224")
    add("--dtype", choices=DTYPES, default="float32", help="of the activations (default: %(default)s)")
    add("--budget", help="such as 8GiB")
    offload = "for a GPU: with the budget, storages of blocks may wait in the host's memory"
    add("--offload", action="store_true", help=offload)
    add("--optimizer", choices=OPTIMIZERS, default="adamw", help="(default: %(default)s)")
    levels = "the level of all blocks, or one per block; chosen if a budget is given and no levels are"
    add("--checkpointing", nargs="+", choices=CHECKPOINTING_LEVELS, metavar="LEVEL", help=levels)
    parser.set_defaults(command=run_plan)


def add_doctor(commands: argparse._SubParsersAction[Parser]) -> None:
    parser = commands.add_parser(
        "doctor",
        help="check this installation: backends, results, memory and speed",
        description="Check this installation on this machine, in less than a minute: its backends, their results "
        "against the naive model in float64, memory and speed. Exit status 0, or 1 where something is wrong.",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there too")
    parser.set_defaults(command=run_doctor)


def add_visualize(commands: argparse._SubParsersAction[Parser]) -> None:
    parser = commands.add_parser(
        "visualize",
        help="draw what a network has learned, as a PNG",
        description="Draw what a network has learned, as a PNG.",
    )
    pictures = parser.add_subparsers(required=True, metavar="PICTURE", dest="picture")

    def add(name: str, text: str) -> argparse.ArgumentParser:
        picture = pictures.add_parser(name, help=text, description=f"Draw {text}, as a PNG.")
        source = picture.add_mutually_exclusive_group(required=True)
        source.add_argument("--checkpoint", type=Path, metavar="FILE", help="written by fit")
        source.add_argument("--model", help="name of a network, such as densenet201")
        picture.add_argument(
            "--weights", help="torchvision's for --model, such as IMAGENET1K_V1; fresh ones if not given"
        )
        picture.add_argument("--image_size", help="pixels per side, with --model (default: 224)", type=positive_int)
        picture.add_argument("--output", type=Path, required=True, metavar="PNG", help="the file to write")
        return picture

    maps = add("maps", "the feature maps of a layer over an image")
    maps.add_argument("image", type=Path, metavar="IMAGE", help="PNG, JPEG, ...")
    maps.add_argument("--layer", default="features.denseblock1", help="name of a module (default: %(default)s)")
    maps.add_argument("--channels", type=positive_int, default=64, help="at most so many (default: %(default)s)")
    cam = add("grad-cam", "where an image speaks for a class (Grad-CAM)")
    cam.add_argument("image", type=Path, metavar="IMAGE", help="PNG, JPEG, ...")
    cam.add_argument("--layer", default="features", help="name of a module (default: %(default)s)")
    cam.add_argument(
        "--class", dest="class_name", metavar="CLASS", help="name or number; the predicted one if not given"
    )
    add("filters", "the filters of the first convolution")
    add("reuse", "how much each layer uses each earlier one (figure 5 of the paper)")
    parser.set_defaults(command=run_visualize)


def run_summary(options: argparse.Namespace) -> None:
    from densenet_efficient.summary_table import print_summary

    print_summary(options.model, options.input)


def run_plan(options: argparse.Namespace) -> None:
    from densenet_efficient.planning.report import print_plan

    levels = options.checkpointing
    if levels is not None and len(levels) == 1:
        levels = levels[0]
    found = plan(
        options.model,
        options.input,
        options.dtype,
        budget=options.budget,
        optimizer=options.optimizer,
        checkpointing=levels,
        offload=options.offload,
    )
    print_plan(found)
    found.check_fits()


def run_doctor(options: argparse.Namespace) -> int:
    from densenet_efficient.doctor import examine

    return examine(options.json)


def run_visualize(options: argparse.Namespace) -> None:
    from densenet_efficient.inspection.command import visualize

    visualize(options)


def positive_int(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text}")
    return int(text)


def input_shape(text: str) -> tuple[int, ...]:
    try:
        return parse_input_shape(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def reader_is_gone() -> bool:
    """Whether nobody reads the standard output any more; if so, what is left of it goes nowhere, at the exit too."""
    try:
        output = sys.stdout.fileno()
    except OSError:  # as of a string
        return False
    poll = select.poll()
    poll.register(output, 0)
    if not any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), output)
    return True


def one_line(error: Exception) -> str:
    """The first line with words of the message; of an OSError without a message of its own, the file and the reason.

    A message that a worker process sends has its traceback before it.
    """
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if lines[0].startswith("Caught "):
        return lines[-1].removeprefix(f"{type(error).__name__}: ")
    return lines[0]


if __name__ == "__main__":
    sys.exit(main())
