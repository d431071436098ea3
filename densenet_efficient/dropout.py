"""Dropout that draws its numbers as F.dropout draws them for contiguous features, whatever layout the features have.

One seed then drops the same features from images of any layout, in one operator and layer by layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def draw_mask(like: Tensor, shape: Sequence[int], drop_rate: float) -> Tensor:
    """What is kept of features of this shape, on the device of ``like``: bool, contiguous."""
    return like.new_empty(shape, dtype=torch.bool).bernoulli_(1 - drop_rate)


def dropout(x: Tensor, drop_rate: float, training: bool) -> Tensor:
    """F.dropout of images [N, C, ...]."""
    if not training or drop_rate == 0:
        return x
    return x * draw_mask(x, x.shape, drop_rate) * _scale(drop_rate)


def drop(rows: Tensor, kept: Tensor, drop_rate: float) -> None:
    """The same of ``rows`` [M, k] in place, by a mask that was drawn."""
    rows.mul_(kept).mul_(_scale(drop_rate))


def _scale(drop_rate: float) -> float:
    """Of what is kept."""
    return 1 / (1 - drop_rate) if drop_rate < 1 else 0


class Dropout(nn.Dropout):
    """nn.Dropout by `dropout`."""

    def forward(self, input: Tensor) -> Tensor:
        return dropout(input, self.p, self.training)
