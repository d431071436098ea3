"""The command line: densenet-efficient train, predict, summary and visualize.

What is heavy to import is imported by the command that needs it, so that --help answers at once.
"""

from __future__ import annotations

import argparse
import pickle
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FAILED, INTERRUPTED = 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0, or 2 after an error of one line, or 130 after Ctrl-C."""
    options = build_parser().parse_args(arguments)
    try:
        options.command(options)
    except KeyboardInterrupt as interrupt:
        print(f"Interrupted; {interrupt}" if interrupt.args else "Interrupted", file=sys.stderr)
        return INTERRUPTED
    except ModuleNotFoundError as error:
        print(f"error: {error}; pip install 'densenet-efficient[train]' brings it", file=sys.stderr)
        return FAILED
    except (OSError, ValueError, RuntimeError, ArithmeticError, pickle.UnpicklingError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return FAILED
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="densenet-efficient", description="Train, use and examine memory-efficient DenseNets."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add_train(commands)
    add_predict(commands)
    add_summary(commands)
    add_visualize(commands)
    return parser


def add_train(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "train",
        help="train a classifier and compare it with the naive implementation",
        description="Train a classifier on images, then measure it, naive and efficient.",
    )

    def add(name: str, text: str, **settings: Any) -> None:
        default = " (default: %(default)s)" if "default" in settings else ""
        parser.add_argument(name, help=text + default, **settings)

    add("--data", "digits, or a folder with one subfolder per class, or with train/ and val/", default="digits")
    add("--output", "where the checkpoint, metrics and pictures go", type=Path, required=True, metavar="DIR")
    add("--model", "one of the networks that summary knows too", default="densenet-bc-40-12")
    add("--epochs", "passes over the training images", type=positive_int, default=12)
    add("--batch-size", "images per step", type=batch_size, default=64)
    add("--learning-rate", "peak of the one-cycle schedule", type=positive_float, default=3e-3)
    add("--image-size", "pixels per side, of a folder's images", type=positive_int, default=224)
    levels = ("none", "bottleneck")
    add("--checkpointing", "what the backward recomputes", choices=levels, default="bottleneck")
    add("--seed", "of the weights, the held-out images, order and augmentation", type=int, default=0)
    add("--device", "cpu, cuda or cuda:N", default="cpu")
    add("--threads", "CPU threads; torch decides if not given", type=positive_int)
    depths = [22, 46, 70, 100]
    add("--memory-depths", "depths of the memory picture", type=positive_int, nargs="+", default=depths)
    parser.set_defaults(command=run_train)


def add_predict(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("predict", help="classify image files", description="Classify image files.")
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="FILE", help="written by train")
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGE", help="PNG, JPEG, ...")
    parser.set_defaults(command=run_predict)


def add_summary(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "summary",
        help="print the layers of a network",
        description="Print the stages and layers of a network.",
    )
    parser.add_argument("model", help="name of the network, such as densenet201")
    parser.add_argument("--input", type=input_shape, required=True, metavar="NxCxHxW", help="such as 4x3x224x224")
    parser.set_defaults(command=run_summary)


def add_visualize(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "visualize",
        help="draw what a network has learned, as a PNG",
        description="Draw what a network has learned, as a PNG.",
    )
    pictures = parser.add_subparsers(required=True, metavar="PICTURE", dest="picture")

    def add(name: str, text: str) -> argparse.ArgumentParser:
        picture = pictures.add_parser(name, help=text, description=f"Draw {text}, as a PNG.")
        source = picture.add_mutually_exclusive_group(required=True)
        source.add_argument("--checkpoint", type=Path, metavar="FILE", help="written by train")
        source.add_argument("--model", help="name of a network, such as densenet201")
        picture.add_argument("--weights", help="torchvision's, such as IMAGENET1K_V1; fresh ones if not given")
        picture.add_argument(
            "--image-size", help="pixels per side, without a checkpoint (default: 224)", type=positive_int, default=224
        )
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


def run_train(options: argparse.Namespace) -> None:
    from rich.console import Console

    from densenet_efficient.training.job import TrainingOptions, train

    given = {name: value for name, value in vars(options).items() if name != "command"}
    train(TrainingOptions(**given), Console())


def run_predict(options: argparse.Namespace) -> None:
    from densenet_efficient.training.checkpoint import load_checkpoint
    from densenet_efficient.training.predict import classify

    for path, ranking in classify(load_checkpoint(options.checkpoint), options.images):
        (best, probability), *_ = ranking
        top = ", ".join(f"{name} {value:.1%}" for name, value in ranking)
        print(f"{path}: {best} ({probability:.1%}); top {len(ranking)}: {top}")


def run_summary(options: argparse.Namespace) -> None:
    from densenet_efficient.summary import print_summary

    print_summary(options.model, options.input)


def run_visualize(options: argparse.Namespace) -> None:
    from densenet_efficient.inspection.command import visualize

    visualize(options)


def positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text}")
    return value


def batch_size(text: str) -> int:
    value = int(text)
    if value < 2:
        raise argparse.ArgumentTypeError(f"expected at least 2, so that a batch has a variance, got {text}")
    return value


def positive_float(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text}")
    return value


def input_shape(text: str) -> tuple[int, ...]:
    from densenet_efficient.summary import parse_input_shape

    try:
        return parse_input_shape(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def one_line(error: Exception) -> str:
    """The first line of the message; of an OSError without a message of its own, the file and the reason."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return (str(error) or type(error).__name__).splitlines()[0]


if __name__ == "__main__":
    sys.exit(main())
