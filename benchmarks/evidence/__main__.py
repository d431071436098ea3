"""`python -m benchmarks.evidence`: measure what docs/evidence.md and docs/comparison.md show.

Each part writes benchmarks/results/<machine>-<part>.json and goes on where an earlier run was cut off; to measure a
part anew, remove its file. `python -m benchmarks.report` then writes the tables and pictures.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from .. import parts
from .. import results as results_file
from . import comparison, frontier, largest_image, scaling, timeline

PARTS: dict[str, Callable[[Path], None]] = {
    "scaling": scaling.measure,
    "timeline": timeline.measure,
    "frontier": frontier.measure,
    "comparison": comparison.measure,
    "largest-image": largest_image.measure,
}


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evidence", description=__doc__)
    parser.add_argument("--output", type=Path, default=results_file.RESULTS, metavar="DIR")
    options, names = parts.parse(parser, PARTS, arguments)
    machine = results_file.describe_machine()["machine"]
    for part in names:
        path = options.output / f"{machine}-{part}.json"
        PARTS[part](path)
        print(f"wrote {path}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
