"""`python -m benchmarks.conversion`: memory of a training step of other libraries' DenseNet-201, and after `convert`.

Writes benchmarks/results/<machine>-conversion.json; rows that it holds are kept, so that a run may be cut off.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from torch import nn

from densenet_efficient import convert
from densenet_efficient.measure import build_model, peak_memory_per_image
from densenet_efficient.summary import format_shape

from . import markdown
from . import results as results_file

BLOCKS_OF_201 = [6, 12, 48, 32]
# By name: the factory of a DenseNet-201, its arguments, and the shape of an image.
SOURCES: dict[str, tuple[str, dict[str, Any], tuple[int, ...]]] = {
    "torchvision": ("torchvision.models:densenet201", {}, (3, 224, 224)),
    "timm": ("timm:create_model", {"model_name": "densenet201"}, (3, 224, 224)),
    "MONAI": (
        "monai.networks.nets:DenseNet201",
        {"spatial_dims": 2, "in_channels": 3, "out_channels": 9},
        (3, 224, 224),
    ),
    "torchxrayvision": ("torchxrayvision.models:DenseNet", {"block_config": BLOCKS_OF_201}, (1, 224, 224)),
    "MONAI, volumes": (
        "monai.networks.nets:DenseNet201",
        {"spatial_dims": 3, "in_channels": 1, "out_channels": 9},
        (1, 64, 64, 64),
    ),
}
BATCHES = {False: (4, 8), True: (32, 64)}  # a converted one needs larger ones for a slope of hundreds of MiB
COLUMNS = ("DenseNet-201 of", "image", "as it was, MiB per image", "converted, MiB per image", "less")


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.conversion", description=__doc__)
    parser.add_argument("--sources", nargs="+", choices=SOURCES, default=list(SOURCES))
    results_file.add_output(parser, "conversion")
    options = parser.parse_args(arguments)
    header = results_file.describe_machine()
    path = options.output or results_file.default_path(header, "conversion")
    results = results_file.load(path, header)
    for source in options.sources:
        if source not in [row["source"] for row in results["rows"]]:
            results["rows"].append(measure(source))
            results["rows"].sort(key=lambda row: list(SOURCES).index(row["source"]))
            results_file.save(path, results)
    print(f"wrote {path}", flush=True)


def measure(source: str) -> dict[str, Any]:
    """MiB per image in float32, in the layout that torch's convolutions are fast in."""
    image = SOURCES[source][2]
    row: dict[str, Any] = {"source": source, "image": list(image)}
    for converted, batches in BATCHES.items():
        print(f"memory: {source}, {'converted' if converted else 'as it was'}", flush=True)
        mib_per_image = peak_memory_per_image(
            "benchmarks.conversion:build",
            {"source": source, "converted": converted},
            image,
            batches,
            channels_last=len(image) == 3,
        )
        row["converted" if converted else "original"] = round(mib_per_image, 1)
    return row


def build(source: str, converted: bool) -> nn.Module:
    """A DenseNet-201 of this library, converted in every part or in none."""
    factory, arguments, _ = SOURCES[source]
    network = build_model(factory, arguments)
    if converted and (left := convert(network).left):
        raise RuntimeError(f"{source}: {left[0].path} was not converted: {left[0].note}")
    return network


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The rows of a results file in Markdown."""
    cells = [
        [
            row["source"],
            format_shape(row["image"][1:]),
            f"{row['original']:.1f}",
            f"{row['converted']:.1f}",
            f"{row['original'] / row['converted']:.1f}x",
        ]
        for row in rows
    ]
    return list(markdown.table(COLUMNS, cells, words=2))


if __name__ == "__main__":
    main(sys.argv[1:])
