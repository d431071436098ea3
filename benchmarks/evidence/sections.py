"""The sections of docs/evidence.md and docs/comparison.md, in Markdown, from the results of each part."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from .. import markdown
from .pictures import LABELS, picture_name

Results = dict[str, Any]
SCALING = {
    "depth": ("depth", "MiB per image by depth: DenseNet-BC with growth rate 12, 32x32 images, float32"),
    "size": ("image", "MiB per image by its size: DenseNet-201, float32"),
    "batch": ("batch", "Peak of the whole process in MiB by batch: DenseNet-201, 224x224 images, float32"),
}
COMPARISON_COLUMNS = (
    "network",
    "parameters",
    "multiply-adds",
    "image",
    "training, MiB per image",
    "training, images/s",
    "inference, images/s",
    "ImageNet top-1",
)


def picture(results: Results, kind: str, text: str) -> str:
    """The picture that `pictures.PICTURES` draws for this part."""
    return f"![{text}](pictures/{picture_name(results, kind)})"


def scaling(results: Results) -> str:
    """A table for each abscissa, a column for each implementation."""
    lines = [markdown.figures_line(results), "", picture(results, "scaling", "memory against depth, size and batch")]
    for against, (column, title) in SCALING.items():
        rows = [row for row in results["rows"] if row["against"] == against]
        names = list(dict.fromkeys(row["implementation"] for row in rows))
        mib = {(row["value"], row["implementation"]): row["mib"] for row in rows}
        values = sorted({value for value, _ in mib})
        cells = [
            [str(value), *(markdown.number(mib.get((value, name)), "{:.1f}") for name in names)] for value in values
        ]
        lines += ["", f"**{title}**", "", *markdown.table((column, *(LABELS[name] for name in names)), cells)]
    return "\n".join([*lines, ""])


def timeline(results: Results) -> str:
    """What of each curve is a figure."""
    lines = [markdown.figures_line(results), "", picture(results, "timeline", "memory through one training step"), ""]
    columns = ("implementation", "kept by the forward, MiB", "peak, MiB")
    cells = [
        [LABELS[row["implementation"]], f"{row['kept_mib']:.1f}", f"{row['peak_mib']:.1f}"] for row in results["rows"]
    ]
    return "\n".join([*lines, *markdown.table(columns, cells), ""])


def largest_image(results: Results) -> str:
    """What was predicted, trained and refused."""
    limit = results["rows"][0]["limit_mib"] / 1024
    lines = [markdown.figures_line(results), ""]
    lines += [picture(results, "largest-image", f"the largest images that train in {limit:g} GiB, to scale"), ""]
    columns = ("implementation", "predicted", "trained", "megapixels", "peak of the process, MiB", "refused")
    cells = [
        [
            LABELS[row["implementation"]],
            _square(row["predicted"]),
            _square(row["largest"]),
            f"{row['largest'] ** 2 / 1e6:.1f}",
            f"{row['peak_mib']:.0f}",
            _square(row["refused"]),
        ]
        for row in results["rows"]
    ]
    return "\n".join([*lines, *markdown.table(columns, cells), ""])


def _square(side: int) -> str:
    return f"{side}x{side}"


def comparison(results: Results) -> str:
    """A line per network and implementation; of several layouts the fastest, and the smallest."""
    lines = [markdown.figures_line(results), ""]
    cells = []
    for network in results["networks"]:
        rows = [row for row in results["rows"] if (row["model"], row["size"]) == (network["model"], network["size"])]
        for implementation in dict.fromkeys(row["implementation"] for row in rows):
            own = [row for row in rows if row["implementation"] == implementation]
            cells.append(_comparison_cells(network, implementation, own))
    return "\n".join([*lines, *markdown.table(COMPARISON_COLUMNS, cells), ""])


def _comparison_cells(network: dict[str, Any], implementation: str, rows: list[dict[str, Any]]) -> list[str]:
    label = "" if implementation == "timm" else f", {LABELS[implementation]}"
    accuracy = ", ".join(
        f"[{weights['top1']:.1f}]({weights['source']})"
        for weights in network["weights"]
        if weights["size"] == network["size"]
    )
    training = [row for row in rows if row["task"] == "train"]
    # Both levels are the same at inference.
    inference = [row for row in rows if row["task"] == "infer"]
    return [
        network["model"] + label,
        f"{network['parameters'] / 1e6:.1f} M",
        f"{network['multiply_adds'] / 1e9:.2f} G",
        _square(network["size"]),
        markdown.number(_best(min, training, "mib_per_image"), "{:.1f}"),
        markdown.number(_best(max, training, "images_per_second"), "{:.1f}"),
        markdown.number(_best(max, inference, "images_per_second"), "{:.1f}"),
        accuracy,
    ]


def _best(choose: Any, rows: Iterable[dict[str, Any]], figure: str) -> float | None:
    return choose((row[figure] for row in rows if row[figure] is not None), default=None)
