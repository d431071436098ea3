"""Every operation of the contract on the Triton backend, against the formulas in plain torch.

On a card, or in Triton's interpreter where TRITON_INTERPRET=1 is set. The interpreter has to be chosen before anything
imports Triton, so `test_triton_kernels.py` runs this file in a process of its own. The cases, the measure of the errors
and their bounds are those of the other backends.
"""

import importlib
import os

import kernel_cases
import pytest
import torch
from kernel_cases import (
    LAYOUTS,
    OVER_ROWS,
    UNNEEDED,
    Factory,
    assert_norms_of_any_stride,
    assert_nothing,
    assert_nothing_beyond_is_touched,
    assert_same_finite,
    assert_statistics_of_stored,
    assert_the_first_of_equal_maxima,
    cast,
    run,
    write_images,
)

from densenet_efficient.kernels import CONTRACT, reference
from densenet_efficient.kernels import triton as backend

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
if INTERPRETED:
    import triton_interpreter

    triton_interpreter.mend()

pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # the interpreter's NumPy
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# images, height, width, input channels, output channels
GEOMETRIES = [
    (1, 1, 1, 1, 1),
    (1, 1, 2, 3, 3),
    (2, 5, 4, 32, 48),
    (1, 9, 8, 150, 12),
    (1, 4, 5, 33, 150),
    (3, 7, 7, 70, 32),
]
ON_A_CARD = [
    (4, 7, 7, 128, 32),
    (1, 8, 9, 513, 48),
    (2, 2, 3, 1, 513),
    (2, 1, 300, 24, 16),
    (1, 33, 47, 64, 128),
    (2, 56, 56, 224, 128),
]
GEOMETRIES += [] if INTERPRETED else ON_A_CARD
# The kernels of float16 are those of bfloat16: one geometry is enough where time is short.
GEOMETRIES_AND_DTYPES = [
    (geometry, dtype)
    for geometry in GEOMETRIES
    for dtype in DTYPES
    if not INTERPRETED or dtype != torch.float16 or geometry == (2, 5, 4, 32, 48)
]
SMALL_SIZES = (
    [(1, 1), (1, 5), (2, 3), (3, 2), (5, 4)] if INTERPRETED else [(h, w) for h in range(1, 8) for w in (1, 2, 7)]
)


def assert_exact(case, dtype, **others):
    kernel_cases.assert_exact(backend, case, dtype, device=DEVICE, **others)


def arguments_of(case, dtype):
    return cast(case, dtype, DEVICE)


@pytest.fixture(autouse=True)
def exact_products(monkeypatch):
    """float32 is not rounded to tf32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.mark.parametrize(("geometry", "dtype"), GEOMETRIES_AND_DTYPES, ids=str)
@pytest.mark.parametrize("operation", CONTRACT)
def test_operation_is_exact(operation, geometry, dtype):
    assert_exact(getattr(Factory(*geometry), operation)(), dtype)


@pytest.mark.parametrize("operation", [name for name in CONTRACT if "conv" in name])
def test_more_outputs_than_one_program_computes(operation):
    """The 1x1's joint backward ends at 256."""
    for dtype in (torch.float32, torch.bfloat16):
        assert_exact(getattr(Factory(1, 2, 3, 5, 261), operation)(), dtype)


@pytest.mark.parametrize("operation", [name for name in CONTRACT if name not in OVER_ROWS])
def test_more_channels_than_one_program_takes(operation):
    assert_exact(getattr(Factory(1, 1, 1, 300, 1), operation)(), torch.float32)


@pytest.mark.skipif(not INTERPRETED, reason="a card takes them where rows are many")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("operation", ["bn_relu_conv3x3", "bn_relu_conv3x3_backward"])
def test_tiles_for_many_rows(operation, dtype, monkeypatch):
    for name in ("bn_relu_conv3x3", "bn_relu_conv3x3_backward_input", "bn_relu_conv3x3_backward_weight"):
        module = importlib.import_module(f"densenet_efficient.kernels.triton.{name}")
        for constant in ("MANY_ROWS", "MANY_ROWS_TOGETHER"):
            monkeypatch.setattr(module, constant, 0, raising=False)
    for geometry in [(2, 9, 8, 150, 12), (3, 9, 7, 70, 48), (2, 9, 8, 70, 32)]:
        assert_exact(getattr(Factory(*geometry), operation)(), dtype)


@pytest.mark.parametrize("operation", OVER_ROWS)
def test_packed_matrices(operation):
    assert_exact(getattr(Factory(2, 3, 5, 24, 16), operation)(), torch.float32, place=torch.Tensor.clone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_images_of_any_layout(layout, dtype):
    for geometry in GEOMETRIES:
        write_images(backend, arguments_of(Factory(*geometry).write_with_statistics(), dtype)["x"], layout)


@pytest.mark.parametrize("size", SMALL_SIZES, ids=str)
@pytest.mark.parametrize("operation", [name for name in CONTRACT if "3x3" in name or "pool" in name])
def test_small_images(operation, size):
    case = getattr(Factory(2, *size, 12, 5), operation)()
    assert_exact(case, torch.float64)
    assert_exact(case, torch.bfloat16)


@pytest.mark.parametrize("window", [(1, 1), (3, 2), (7, 9), (1, 9)], ids=str)
def test_windows_of_the_average_pooling(window):
    factory = Factory(2, 7, 9, 17, 1)
    for dtype in (torch.float64, torch.float16):
        assert_exact(factory.bn_relu_avg_pool(window), dtype)
        assert_exact(factory.bn_relu_avg_pool_backward(window, accumulate=False), dtype)


@pytest.mark.skipif(not INTERPRETED, reason="a card's memory goes on behind a tensor")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("operation", CONTRACT)
def test_nothing_beyond_the_tensors_is_touched(operation, dtype):
    for outputs in (20, 48):
        case = getattr(Factory(2, 5, 4, 33, outputs), operation)()
        arguments = arguments_of(case, dtype)
        if operation in OVER_ROWS and "weight" in arguments:  # so that kernels take it as it is
            arguments["weight"] = arguments["weight"].contiguous(memory_format=torch.channels_last)
        assert_nothing_beyond_is_touched(backend, case, arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("operation", ["bn_relu_conv3x3_backward", "bn_relu_avg_pool_backward"])
def test_gradient_is_assigned_where_it_does_not_accumulate(operation, dtype):
    assert_exact(getattr(Factory(2, 5, 4, 32, 48), operation)(accumulate=False), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("operation", "unneeded"), UNNEEDED, ids=str)
def test_results_that_nobody_needs(operation, unneeded, dtype):
    assert_exact(getattr(Factory(2, 5, 4, 33, 48), operation)().without(*unneeded), dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("operation", CONTRACT)
def test_means_far_from_zero(operation, dtype):
    case = getattr(Factory(2, 9, 8, 33, 12, mean=1e3), operation)()
    assert_exact(case, dtype, floors={torch.float64: 1e-12, torch.float32: 2e-5})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operation", ["bn_relu_conv1x1", "bn_relu_conv3x3"])
def test_statistics_are_those_of_the_stored_values(operation, dtype):
    """Also where rounding has moved the values."""
    case = getattr(Factory(1, 13, 11, 24, 16), operation)()
    assert_statistics_of_stored(run(backend, case, arguments_of(case, dtype)))


def test_statistics_far_from_zero_of_many_tiles():
    """Mean 1e3, standard deviation 1: what the difference of two sums of squares would get wrong by 5 %."""
    case = Factory(3, 33, 47, 17, 1, mean=1e3).channel_stats()
    arguments = arguments_of(case, torch.float32)
    results = run(backend, case, arguments)
    variance, mean = torch.var_mean(arguments["x"].double(), 0, correction=0)
    torch.testing.assert_close(results["mean"].double(), mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(results["variance"].double(), variance, rtol=2e-5, atol=0)


def test_statistics_of_constants():
    """Of each channel another one: what many programs have found alike is merged to the last bit."""
    x = (torch.randn(64, generator=torch.Generator().manual_seed(0)) * 1e3).to(DEVICE).expand(28 * 256, 64)
    mean, variance = torch.full((2, 64), torch.nan, device=DEVICE)
    backend.channel_stats(x.contiguous(), mean, variance)
    assert torch.equal(mean, x[0])
    assert not variance.any()


def test_partial_results_of_more_programs_than_are_merged_at_once():
    """Merged by merging the merged: statistics and sums of 1100 rows, each a part."""
    from densenet_efficient.kernels.triton.statistics import finish_statistics, finish_sums

    parts = torch.randn(2, 1100, 3, dtype=torch.float64, device=DEVICE) + 1e3
    statistics = torch.stack([torch.full_like(parts[0], 7), parts[0], parts[1]])
    mean, variance, first, second = torch.empty(4, 3, dtype=torch.float64, device=DEVICE)
    finish_statistics(statistics, mean, variance)
    finish_sums(parts, first, second)
    torch.testing.assert_close(mean, parts[0].mean(0))
    torch.testing.assert_close(variance, parts[0].var(0, correction=0) + parts[1].mean(0) / 7)
    torch.testing.assert_close(torch.stack([first, second]), parts.sum(1))


@pytest.mark.parametrize("operation", [name for name in CONTRACT if "conv" in name])
def test_float32_weights_beside_low_precision_activations(operation):
    """As autocast keeps them."""
    case = getattr(Factory(2, 3, 6, 48, 32), operation)()
    for dtype in (torch.bfloat16, torch.float16):
        arguments = arguments_of(case, dtype)
        expected = run(backend, case, arguments)
        results = run(backend, case, arguments | {"weight": arguments["weight"].float()})
        assert all(torch.equal(results[name], value) for name, value in expected.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("operation", OVER_ROWS)
def test_non_finite_values_come_out(operation, dtype):
    case = getattr(Factory(2, 4, 5, 19, 13), operation)()
    for value in (torch.nan, torch.inf) if INTERPRETED else (torch.nan, torch.inf, -torch.inf):
        for name in ("x", "out_grad"):
            if name not in case.arguments:
                continue
            arguments = arguments_of(case, dtype)
            arguments[name] = arguments[name].clone()
            arguments[name][1, 2] = value
            assert_same_finite(run(backend, case, arguments), run(reference, case, arguments))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("operation", CONTRACT)
def test_the_same_bits_in_every_run(operation, dtype):
    case = getattr(Factory(1, 13, 11, 40, 24) if INTERPRETED else Factory(4, 33, 31, 224, 128), operation)()
    arguments = arguments_of(case, dtype)
    expected = run(backend, case, arguments)
    for _ in range(1 if INTERPRETED else 5):
        results = run(backend, case, arguments)
        assert all(torch.equal(results[name], value) for name, value in expected.items())


def test_the_first_of_equal_maxima():
    assert_the_first_of_equal_maxima(backend, DEVICE)


def test_norms_of_any_stride():
    assert_norms_of_any_stride(backend, DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("operation", [name for name in CONTRACT if "conv" in name])
def test_weights_of_any_stride(operation, dtype):
    """Every second channel of a wider one, channels last: torch calls it channels-last already."""
    case = getattr(Factory(2, 5, 4, 32, 48), operation)()
    arguments = arguments_of(case, dtype)
    expected = run(backend, case, arguments)
    weight = arguments["weight"]
    wide = weight.repeat_interleave(2, 1).contiguous(memory_format=torch.channels_last)
    results = run(StridedWeight(backend, operation, wide[:, ::2]), case, arguments)
    assert all(torch.equal(results[name], value) for name, value in expected.items())


class StridedWeight:
    """A backend that is given this weight in the place of any other: what is copied for a case is dense."""

    def __init__(self, backend, operation, weight):
        run = getattr(backend, operation)
        setattr(self, operation, lambda **arguments: run(**arguments | {"weight": weight}))


@pytest.mark.parametrize("operation", OVER_ROWS)
def test_no_images(operation):
    """An empty batch: what is summed over it is zero, and so are its statistics."""
    case = getattr(Factory(0, 4, 6, 5, 3), operation)()
    results = run(backend, case, arguments_of(case, torch.float32))
    assert_nothing(results)


# The last row of each matrix lies beyond 2^31 elements; of each row a page is touched.
@pytest.mark.large
@pytest.mark.parametrize("operation", OVER_ROWS)
def test_more_than_2_to_the_31_elements_in_one_storage(operation):
    def place(matrix):
        rows = len(matrix)
        stride = 2**31 // (rows - 1) // 64 * 64 + 64
        assert (rows - 1) * stride > 2**31
        storage = torch.empty(rows * stride, dtype=matrix.dtype, device=DEVICE)
        return storage.as_strided(matrix.shape, (stride, 1)).copy_(matrix)

    for unneeded in ([], *(names for name, names in UNNEEDED if name == operation)):  # which other kernels may compute
        case = getattr(Factory(1, 8, 10, 24, 8), operation)().without(*unneeded)
        arguments = arguments_of(case, torch.bfloat16)
        expected = run(backend, case, arguments)
        results = run(backend, case, arguments, place)
        assert all(torch.equal(results[name], value) for name, value in expected.items())


@pytest.mark.large
@pytest.mark.parametrize("strides", [(2**30, 3, 1), (3, 2**30, 1), (3, 1, 2**30)], ids=str)
def test_images_of_more_than_2_to_the_31_elements(strides):
    """Between images, between channels or between pixels."""
    images = torch.empty(2**31 + 16, dtype=torch.bfloat16, device=DEVICE).as_strided((3, 3, 3), strides)
    numbers = torch.arange(27, device=DEVICE).view(3, 3, 3)
    images.copy_(numbers)
    out, (mean, variance) = images.new_empty(9, 3), torch.empty(2, 3, device=DEVICE)
    backend.write_with_statistics(images, out, mean, variance)
    assert torch.equal(out, numbers.transpose(1, 2).reshape(9, 3).bfloat16())
    assert mean.tolist() == [10, 13, 16]


def test_more_pixels_than_kernels_count():
    x, out = torch.zeros(1, 1, 1).expand(2**16, 1, 2**15), torch.zeros(1, 1).expand(2**31, 1)
    mean, variance = torch.zeros(2, 1)
    with pytest.raises(RuntimeError, match=r"at most 2147481600 pixels, got 2147483648; use a smaller batch"):
        backend.write_with_statistics(x, out, mean, variance)
    with pytest.raises(RuntimeError, match=r"at most 2147481600 pixels"):
        backend.bn_relu_max_pool(out, mean, variance, 2**15, 2**16, torch.zeros(1, 1))


@pytest.mark.parametrize("window", [(1, 1), (2, 2), (2**15, 2**16)], ids=str)
def test_more_pixels_than_poolings_count(window):
    """Of a stage whose norms all use their running statistics the pooling is what counts pixels first."""
    size, vector = (2**15, 2**16), torch.zeros(1)
    x, pooled = torch.zeros(1, 1).expand(2**31, 1), torch.zeros(1, 1).expand(2**31 // (window[0] * window[1]), 1)
    with pytest.raises(RuntimeError, match=r"at most 2147481600 pixels, got 2147483648"):
        backend.bn_relu_avg_pool(x, vector, vector, *size, *window, pooled)
    with pytest.raises(RuntimeError, match=r"at most 2147481600 pixels, got 2147483648"):
        backend.bn_relu_avg_pool_backward(
            pooled, x, vector, vector, vector, *size, *window, None, False, vector, vector
        )


def test_more_pixels_than_the_backward_of_the_maximum_counts():
    x, pooled, vector = torch.zeros(1, 1).expand(2**31, 1), torch.zeros(1, 1).expand(2**29, 1), torch.zeros(1)
    with pytest.raises(RuntimeError, match=r"at most 2147481600 pixels, got 2147483648"):
        backend.bn_relu_max_pool_backward(pooled, x, vector, vector, vector, 2**15, 2**16, x, vector, vector)


@pytest.mark.parametrize("operation", [name for name in CONTRACT if "conv" in name])
def test_tf32(operation, monkeypatch):
    """Where torch's own convolutions may round float32 operands to ten bits of mantissa, ours do.

    The interpreter does not round, but takes the tiles and the layouts of the weights that belong to it.
    """
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    for geometry in [(2, 13, 11, 96, 128), (2, 9, 8, 150, 12)]:
        assert_exact(getattr(Factory(*geometry), operation)(), torch.float32, floors={torch.float32: 2**-9})
