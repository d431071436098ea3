"""Naive beside efficient, as a training's end compares them: the same weights in both, and how it is told."""

from __future__ import annotations

import io

import pytest
import torch
from rich.console import Console
from torch import nn

from densenet_efficient.models import EfficientDenseNet
from densenet_efficient.training import comparison
from densenet_efficient.training.comparison import Comparison, compare, comparison_table


def test_both_have_the_weights_of_the_model_and_its_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("make_step", "step_times", "compare_memory"):
        monkeypatch.setattr(comparison, name, lambda *_, **__: {})
    torch.manual_seed(0)
    model = EfficientDenseNet(8, (2, 2), 16, num_classes=8).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean = torch.randn(module.num_features)
    images = torch.rand(16, 3, 32, 32)
    with torch.no_grad():
        labels = model(images).argmax(1)
    assert len(labels.unique()) > 1
    assert compare(model, (3, 32, 32), [(images, labels)], 16, "cpu").accuracy == {"naive": 1.0, "efficient": 1.0}


def test_the_table_says_what_is_saved() -> None:
    found = Comparison(
        {"naive": 0.5, "efficient": 0.25}, {"naive": 30.0, "efficient": 10.0}, {"naive": 8.0, "efficient": 2.0}
    )
    text = io.StringIO()
    Console(file=text, width=100).print(comparison_table(found))
    rows = [line.replace("│", " ").split() for line in text.getvalue().splitlines()]
    assert ["validation", "accuracy", "50.00%", "25.00%", "NOT", "EQUAL"] in rows
    assert ["time", "per", "step", "30.00", "ms", "10.00", "ms", "3.0x"] in rows
    assert ["peak", "memory", "per", "image", "8.00", "MiB", "2.00", "MiB", "4.0x"] in rows
