"""The table of `benchmarks.gpu_tiles`, which is written without a GPU, and without Triton."""

from __future__ import annotations

from typing import Any

from . import markdown

BARE = {
    "bn_relu_conv1x1": ("conv1x1",),
    "bn_relu_conv1x1_backward_joint": ("conv1x1 backward, input", "conv1x1 backward, weight"),
    "bn_relu_conv3x3": ("conv3x3",),
    "bn_relu_conv3x3_backward_input": ("conv3x3 backward, input",),
    "bn_relu_conv3x3_backward_weight": ("conv3x3 backward, weight",),
}


def table(results: dict[str, Any]) -> list[str]:
    """The fastest tile of each kernel beside the bare products of its convolution, microseconds, by size of images."""
    sides = sorted({row["side"] for row in results["rows"]}, reverse=True)

    def cell(kernel: str, side: int) -> str:
        mine = [
            row for row in results["rows"] if (row["kernel"], row["side"]) == (kernel, side) and row["microseconds"]
        ]
        bare = [row for row in results["products"] if row["product"] in BARE[kernel] and row["side"] == side]
        if not mine:
            return ""
        fastest = min(mine, key=lambda row: row["microseconds"])
        return f"{fastest['microseconds']:.0f} / {sum(row['microseconds'] for row in bare):.0f}"

    kernels = dict.fromkeys(row["kernel"] for row in results["rows"])
    cells = [[f"`{kernel}`", *(cell(kernel, side) for side in sides)] for kernel in kernels]
    return markdown.table(("kernel, with all that is fused / bare", *(f"{side}x{side}" for side in sides)), cells)
