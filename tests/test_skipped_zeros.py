"""Products of activations that skip the zeros a ReLU leaves, on a CPU with registers for it.

Whether zeros are skipped depends on a sample of the rows, so the cases differ in how many of the activations are zero.
"""

import functools

import kernel_cases
import pytest
import torch
from cases import needs_native
from kernel_cases import Factory, assert_nothing, assert_same_finite, cast, run

from densenet_efficient.kernels import cpu, reference

pytestmark = [needs_native, pytest.mark.each_capability, pytest.mark.usefixtures("one_thread")]
OPERATIONS = ["bn_relu_conv1x1", "bn_relu_conv1x1_backward"]
SHARES = [0.0, 0.02, 0.5, 0.6, 1.0]  # of the activations that are not zero
# images, height, width, input channels, output channels: too few outputs, the fewest, those of one part and of several,
# the most whose gradients are left out and more; odd rows, and tiles of several chunks, panels and groups
GEOMETRIES = [
    (1, 1, 1, 1, 128),
    (1, 1, 3, 7, 128),
    (1, 7, 7, 63, 128),
    (1, 8, 8, 65, 256),
    (1, 6, 7, 70, 80),
    (1, 7, 9, 66, 96),
    (2, 4, 11, 97, 112),
    (1, 9, 9, 80, 144),
    (2, 7, 5, 67, 160),
    (1, 9, 13, 130, 192),
    (1, 8, 9, 129, 208),
    (1, 5, 23, 150, 384),
    (1, 19, 31, 577, 128),
    (2, 28, 31, 96, 128),
]

assert_exact = functools.partial(kernel_cases.assert_exact, cpu)


def case_of(operation, geometry, share):
    """Of which about this share of the activations is not zero, all as far from it as those of `Factory`."""
    factory = Factory(*geometry)
    case = getattr(factory, operation)()
    x, scale, shift = (case.arguments[name] for name in ("x", "scale", "shift"))
    signs = torch.where(factory.uniform(0, 1, *x.shape) < share, 1.0, -1.0)
    x = ((x * scale + shift).abs() * signs - shift) / scale
    mean = {"mean": x.mean(0)} if operation == "bn_relu_conv1x1_backward" else {}
    return case._replace(arguments=case.arguments | {"x": x} | mean)


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=lambda geometry: "x".join(map(str, geometry)))
@pytest.mark.parametrize("operation", OPERATIONS)
def test_products_are_exact(operation, geometry, share):
    case = case_of(operation, geometry, share)
    assert_exact(case, torch.float32)
    assert_exact(case, torch.bfloat16)


@pytest.mark.parametrize(
    "unneeded", [["grad"], ["grad_weight"], ["grad", "grad_weight"], ["grad", "sum_grad", "sum_grad_x"]], ids=str
)
def test_results_that_nobody_needs(unneeded):
    for geometry in GEOMETRIES[2:-2]:
        assert_exact(case_of("bn_relu_conv1x1_backward", geometry, 0.4).without(*unneeded), torch.float32)


def test_a_row_has_the_same_bits_whether_zeros_are_skipped_or_not():
    """In one order all rows of the sample are without zeros, in the other most of them have many."""
    rows, sampled = 128, 8
    case = case_of("bn_relu_conv1x1", (1, 8, 16, 577, 128), 0.3).without("mean", "variance")
    arguments = cast(case, torch.float32)
    dense = torch.arange(0, rows, rows // sampled)
    arguments["x"][dense] = case_of("bn_relu_conv1x1", (1, 8, 16, 577, 128), 1.0).arguments["x"][dense].float()
    order = torch.arange(rows).roll(1)
    expected = run(cpu, case, arguments)["out"]
    rolled = run(cpu, case, arguments | {"x": arguments["x"].roll(1, 0)})["out"]
    assert torch.equal(rolled, expected[order])


@pytest.mark.parametrize("operation", OPERATIONS)
def test_no_images(operation):
    case = getattr(Factory(0, 4, 6, 70, 128), operation)()
    assert_nothing(run(cpu, case, cast(case, torch.float32)))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["x", "out_grad"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_non_finite_values_come_out(operation, name, value):
    case = case_of(operation, (2, 7, 15, 70, 128), 0.4)
    if name not in case.arguments:
        pytest.skip("has no such argument")
    arguments = cast(case, torch.float32)
    arguments[name] = arguments[name].clone()
    arguments[name][1, 2] = value
    assert_same_finite(run(cpu, case, arguments), run(reference, case, arguments))
