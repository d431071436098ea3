"""The roofline: what it counts, that it counts everything, and that it leaves nothing behind."""

from typing import Any

import pytest
import torch
from cases import needs_native

from benchmarks import roofline
from benchmarks.implementations import build
from densenet_efficient import kernels

pytestmark = needs_native


@pytest.fixture(scope="module")
def tiny() -> roofline.Roofline:
    return roofline.measure("tiny", "float32", batch=2, size=64, level="none", rounds=2)


def test_the_lines_add_up_to_the_step(tiny: roofline.Roofline) -> None:
    assert sum(line.seconds for line in tiny.lines) == pytest.approx(tiny.step_seconds)
    assert tiny.lines[-1].operation == roofline.REST
    assert tiny.lines[-1].seconds > 0


def test_every_operation_of_a_step_has_its_lines(tiny: roofline.Roofline) -> None:
    assert {line.operation for line in tiny.lines} == {*kernels.CONTRACT, roofline.REST}
    calls = {line.operation: line.calls for line in roofline.merged_by_operation(tiny).lines}
    assert calls["bn_relu_conv3x3"] == 4  # layers
    assert calls["bn_relu_conv1x1_backward"] == 5  # and the transition


def test_flops_of_the_convolutions(tiny: roofline.Roofline) -> None:
    """growth rate 8, bottleneck 32; 2 images of 64x64 make 2 * 16 * 16 rows in block 1."""
    rows = 2 * 16 * 16
    flops = {(line.operation, line.rows): line.flops for line in tiny.lines}
    assert flops["bn_relu_conv1x1", rows] == 2 * rows * (16 + 24) * 32
    assert flops["bn_relu_conv1x1_backward", rows] == 2 * flops["bn_relu_conv1x1", rows]
    assert flops["bn_relu_conv3x3", rows] == 2 * (2 * rows * 32 * 8 * 9)
    assert flops["bn_relu_conv3x3_backward", rows] == 2 * flops["bn_relu_conv3x3", rows]
    assert sum(flops.values()) < tiny.step_flops  # stem and classifier are torch's


def test_bytes_of_what_is_updated_in_place(tiny: roofline.Roofline) -> None:
    """It is read and written, as the copy whose rate they are compared with reads and writes."""
    rows = 2 * 16 * 16
    found = {(line.operation, line.rows): line.bytes for line in tiny.lines}
    # Block 1 and its layers correct 8, 8 and 16 channels: a gradient twice and the features, and three vectors of each.
    assert found["project_gradient", rows] == 4 * (8 + 8 + 16) * (3 * rows + 3)
    widths = (16, 24)  # of what the layers read: its gradient twice and itself, the bottleneck and its gradient
    matrices = sum(3 * rows * channels + 2 * rows * 32 for channels in widths)
    vectors = sum(5 * channels + 3 * 32 + 2 * channels * 32 for channels in widths)
    assert found["bn_relu_conv1x1_backward", rows] == 4 * (matrices + vectors)


@pytest.mark.parametrize("accumulate", [True, False])
def test_bytes_of_what_is_updated_in_place_where_that_is_asked_for(accumulate: bool) -> None:
    x, grad, vector = torch.zeros(6, 3), torch.zeros(6, 3), torch.zeros(3)
    with roofline.recorded(kernels.cpu) as lines:
        kernels.cpu.bn_relu_avg_pool_backward(
            torch.zeros(1, 3), x, vector, vector, vector, 2, 3, 2, 3, grad, accumulate, vector, vector
        )
    assert lines["bn_relu_avg_pool_backward", 6].bytes == 4 * (3 + (3 if accumulate else 2) * 18 + 5 * 3)


def test_gradients_that_nobody_needs_are_not_counted() -> None:
    network: Any = build("ours-none", "tiny")
    for parameter in network.features.parameters():
        parameter.requires_grad = False
    network.features.denseblock2.denselayer1.conv2.weight.requires_grad = True
    with roofline.recorded(kernels.cpu) as lines:
        network(torch.rand(2, 3, 64, 64)).sum().backward()
    product = 2 * (2 * 8 * 8) * 32 * 8 * 9
    # The weight's gradient in that layer, the input's in the one behind it, which is frozen.
    assert lines["bn_relu_conv3x3_backward", 2 * 8 * 8].flops == 2 * product


def test_nothing_is_left_behind() -> None:
    before = {name: getattr(kernels.cpu, name) for name in kernels.CONTRACT}
    with pytest.raises(KeyboardInterrupt), roofline.recorded(kernels.cpu):
        raise KeyboardInterrupt
    assert {name: getattr(kernels.cpu, name) for name in kernels.CONTRACT} == before


def test_rates_of_the_machine() -> None:
    single = roofline.product_rate(torch.float32, 0.01)
    assert single > roofline.product_rate(torch.float64, 0.01) > 0
    assert roofline.copy_rate(2**20) > 0


def test_the_command_prints_its_tables(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    roofline.main(["--models=tiny", "--dtypes=float32", "--batch=2", "--size=64", "--rounds=1"])
    output = capsys.readouterr().out
    assert "of the roof" in output
    assert output.count("bn_relu_conv1x1_backward") >= 3  # merged, and once per size of images
