"""The CUDA operators without a card: their sources compiled by a C++ compiler, every CUDA thread a fiber.

Checks, launches and kernels are those of csrc/cuda; only the headers of CUDA are those of tests/cuda_shim. What is
found here: wrong indices, masks, strides and dtypes, missing barriers, memory that nobody wrote.
"""

import ctypes
from types import SimpleNamespace

import pytest
import torch
from cases import needs_native
from cuda_shim.build import library_path
from kernel_cases import OVER_ROWS, Factory, assert_exact, assert_same_finite, cast, in_slot, run

from densenet_efficient.kernels import CONTRACT, reference

pytestmark = [needs_native, pytest.mark.usefixtures("one_thread", "nan_memory")]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
OPERATIONS = [name for name in CONTRACT if "conv" not in name]
PIXELWISE = [name for name in OPERATIONS if "pool" in name]
# images, height, width, channels: odd in every way; several tiles of rows, several blocks along a row
GEOMETRIES = [
    (1, 1, 1, 1),
    (2, 2, 1, 12),
    (2, 5, 4, 32),
    (3, 7, 6, 17),
    (2, 9, 8, 150),
    (1, 33, 47, 64),
    (5, 19, 17, 3),
]


@pytest.fixture(scope="module")
def shim():
    """The operators by name, as a backend has them."""
    library = torch.library.Library("cuda_shim", "DEF")
    for name in OPERATIONS:
        schema = getattr(torch.ops.densenet_efficient, name).default._schema
        library.define(str(schema).partition("::")[2])
    torch.ops.load_library(str(library_path()))
    yield SimpleNamespace(**{name: getattr(torch.ops.cuda_shim, name).default for name in OPERATIONS})
    library._destroy()


def factory(geometry, mean=0.0):
    return Factory(*geometry, 1, mean)


def packed_and_aligned(matrix):
    """In rows of a multiple of 16 bytes, so that they are accessed in pieces of 16 bytes."""
    rows, columns = matrix.shape
    return matrix.new_zeros(rows, -(-columns // 16) * 16)[:, :columns].copy_(matrix)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=lambda geometry: "x".join(map(str, geometry)))
@pytest.mark.parametrize("operation", OPERATIONS)
def test_operation_is_exact(shim, operation, geometry, dtype):
    case = getattr(factory(geometry), operation)()
    assert_exact(shim, case, dtype, in_slot)
    assert_exact(shim, case, dtype, packed_and_aligned)


@pytest.mark.parametrize("height", range(1, 10))
@pytest.mark.parametrize("operation", PIXELWISE)
def test_small_images(shim, operation, height):
    for width in range(1, 10):
        assert_exact(shim, getattr(factory((2, height, width, 4)), operation)(), torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [(1, 1), (2, 2), (3, 2), (3, 5), (7, 9), (1, 9), (4, 4)])
def test_windows_of_the_average_pooling(shim, window, dtype):
    for channels in (16, 17):
        images = factory((2, 7, 9, channels))
        assert_exact(shim, images.bn_relu_avg_pool(window), dtype, packed_and_aligned)
        for accumulate in (True, False):
            assert_exact(shim, images.bn_relu_avg_pool_backward(window, accumulate), dtype, packed_and_aligned)


def test_strips_of_squares(shim):
    """The maximum pooling's backward on images of several squares, and with so many that a block takes a strip."""
    assert_exact(shim, factory((1, 35, 50, 8)).bn_relu_max_pool_backward(), torch.float32)
    assert_exact(shim, factory((600, 2, 50, 1)).bn_relu_max_pool_backward(), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("operation", "unneeded"),
    [
        ("bn_relu_avg_pool_backward", ["grad"]),
        ("batch_norm_gradients", ["grad_weight"]),
        ("batch_norm_gradients", ["slope", "offset"]),
    ],
    ids=str,
)
def test_results_that_nobody_needs(shim, operation, unneeded, dtype):
    assert_exact(shim, getattr(factory((2, 5, 4, 32)), operation)().without(*unneeded), dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_means_far_from_zero(shim, operation, dtype):
    case = getattr(factory((2, 9, 8, 33), mean=1e3), operation)()
    assert_exact(shim, case, dtype, floors={torch.float64: 1e-12, torch.float32: 2e-5})


def test_statistics_far_from_zero(shim):
    """Mean 1e3, standard deviation 1: what the difference of two sums of squares would get wrong by 5 %."""
    case = factory((2, 33, 47, 17), mean=1e3).channel_stats()
    arguments = cast(case, torch.float32)
    results = run(shim, case, arguments)
    variance, mean = torch.var_mean(arguments["x"].double(), 0, correction=0)
    torch.testing.assert_close(results["mean"].double(), mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(results["variance"].double(), variance, rtol=2e-5, atol=0)


def test_statistics_of_a_constant(shim):
    x = torch.full((700, 9), 1e3 / 3)
    mean, variance = torch.empty(9), torch.empty(9)
    shim.channel_stats(x, mean, variance)
    assert (mean == x[0]).all()
    assert (variance == 0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("operation", [name for name in OPERATIONS if name in OVER_ROWS])
def test_non_finite_values_come_out(shim, operation, value, dtype):
    case = getattr(factory((2, 7, 5, 19)), operation)()
    for name in {"x", "out_grad"} & case.arguments.keys():
        arguments = cast(case, dtype)
        arguments[name] = arguments[name].clone()
        arguments[name][1, 2] = arguments[name][-1, 3] = value
        expected = run(reference, case, arguments)
        assert_same_finite(run(shim, case, arguments), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_same_bits_whatever_the_alignment(shim, operation, dtype):
    """And whatever the order in which a block's threads run, which differs from call to call."""
    case = getattr(factory((2, 17, 15, 40)), operation)()
    arguments = cast(case, dtype)
    results = [run(shim, case, arguments, place) for place in (in_slot, packed_and_aligned, packed_and_aligned)]
    for other in results[1:]:
        assert all(torch.equal(other[name], value) for name, value in results[0].items())


@pytest.mark.parametrize("operation", [name for name in OPERATIONS if name in OVER_ROWS])
def test_no_images(shim, operation):
    """An empty batch: what is summed over it is zero."""
    case = getattr(factory((0, 4, 6, 5)), operation)()
    results = run(shim, case, cast(case, torch.float32))
    assert all(not results[name].any() for name in ("sum_grad", "sum_grad_x") if name in results)


@pytest.mark.parametrize("statistics", DTYPES, ids=str)
@pytest.mark.parametrize("parameters", DTYPES, ids=str)
def test_statistics_and_parameters_of_any_dtype(shim, statistics, parameters):
    case = factory((1, 1, 1, 37)).batch_norm_affine()
    arguments = cast(case, torch.float32)
    for names, dtype in ((("mean", "variance"), statistics), (("weight", "bias"), parameters)):
        arguments |= {name: arguments[name].to(dtype) for name in names}
    expected = run(reference, case, arguments)["affine"]
    torch.testing.assert_close(run(shim, case, arguments)["affine"], expected, rtol=1e-6, atol=1e-6)


def test_the_first_of_equal_maxima(shim):
    """Equal as the storage's dtype has them: after rounding, 1 + 2^-9 is 1 in bfloat16."""
    x = torch.ones(4, 8, dtype=torch.bfloat16)
    x[3] = 1 + 2**-7
    scale, shift = torch.full((8,), 2**-2), torch.full((8,), 0.75)
    assert (x * scale + shift).bfloat16().unique().numel() == 1
    grad, sums = torch.empty_like(x), [torch.empty(8), torch.empty(8)]
    out_grad = torch.ones(1, 8, dtype=torch.bfloat16)
    shim.bn_relu_max_pool_backward(out_grad, x, torch.zeros(8), scale, shift, 2, 2, grad, *sums)
    assert grad[:, 0].tolist() == [0.25, 0, 0, 0]


def test_a_dtype_that_no_storage_has(shim):
    with pytest.raises(TypeError, match="expected float32, float64, bfloat16 or float16, got Int"):
        shim.channel_stats(torch.zeros(3, 4, dtype=torch.int32), torch.zeros(4), torch.zeros(4))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_impossible_arguments(shim, operation):
    case = getattr(factory((2, 4, 6, 5)), operation)()
    arguments = cast(case, torch.float32)
    for name, value in arguments.items():
        if not isinstance(value, torch.Tensor):
            continue
        for wrong in (value.new_zeros([size + 1 for size in value.shape]), value.unsqueeze(0)):
            with pytest.raises(RuntimeError, match="must"):
                getattr(shim, operation)(**arguments | {name: wrong})


@pytest.mark.parametrize("operation", PIXELWISE)
@pytest.mark.parametrize("size", [{"height": 5}, {"height": 0}, {"width": -6, "height": -4}])
def test_rows_that_are_no_images(shim, operation, size):
    case = getattr(factory((2, 4, 6, 5)), operation)()
    with pytest.raises(RuntimeError, match="one row per pixel"):
        getattr(shim, operation)(**cast(case, torch.float32) | size)


def test_the_mathematics_on_vectors(shim):
    """As the CPU kernels have them: csrc/batch_norm.h is written once."""
    assert ctypes.CDLL(str(library_path())).vectors_agree_with_numbers()
