"""`python -m benchmarks.segmentation`: memory of a training step of FC-DenseNets, naive and efficient, per image.

Writes benchmarks/results/<machine>-segmentation.json. The naive networks take several GiB at the default size.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from densenet_efficient.measure import DTYPES, peak_memory_per_image
from densenet_efficient.summary import format_shape

from . import markdown
from . import results as results_file

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "fc-densenet56": {"growth_rate": 12, "block_config": [4] * 6},
    "fc-densenet67": {"growth_rate": 16, "block_config": [5] * 6},
    "fc-densenet103": {"growth_rate": 16, "block_config": [4, 5, 7, 10, 12, 15]},
}
FACTORIES = {
    "naive": "densenet_efficient.reference:NaiveFCDenseNet",
    "ours": "densenet_efficient.segmentation:FCDenseNet",
}
COLUMNS = ("network", "images", "dtype", "naive, MiB per image", "ours, MiB per image", "less")


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.segmentation", description=__doc__)
    parser.add_argument("--models", nargs="+", choices=CONFIGURATIONS, default=list(CONFIGURATIONS))
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--size", nargs=2, type=int, default=[360, 480], help="height and width, as in CamVid")
    parser.add_argument("--batches", nargs=2, type=int, default=[1, 2], help="between which memory is compared")
    parser.add_argument("--device", default="cpu")
    results_file.add_output(parser, "segmentation")
    options = parser.parse_args(arguments)
    header = results_file.describe_machine(options.device)
    path = options.output or results_file.default_path(header, "segmentation")
    rows = [measure(model, options) for model in options.models]
    results_file.save(path, {"header": header, "rows": rows})
    print(f"wrote {path}", flush=True)


def measure(model: str, options: argparse.Namespace) -> dict[str, Any]:
    """MiB per image of both implementations."""
    row: dict[str, Any] = {"model": model, "size": options.size, "dtype": options.dtype, "batches": options.batches}
    for implementation, factory in FACTORIES.items():
        print(f"memory: {model}, {implementation}", flush=True)
        mib_per_image = peak_memory_per_image(
            factory,
            CONFIGURATIONS[model],
            (3, *options.size),
            tuple(options.batches),
            dtype=options.dtype,
            device=options.device,
        )
        row[implementation] = round(mib_per_image, 1)
    return row


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The rows of a results file in Markdown."""
    cells = []
    for row in rows:
        words = [row["model"], format_shape(row["size"]), row["dtype"]]
        cells.append([*words, f"{row['naive']:.0f}", f"{row['ours']:.0f}", f"{row['naive'] / row['ours']:.1f}x"])
    return markdown.table(COLUMNS, cells, words=3)


if __name__ == "__main__":
    main(sys.argv[1:])
