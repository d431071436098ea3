"""The native CUDA operators, on a card where there is one, and everywhere without.

Without a card their sources are compiled by a C++ compiler, every CUDA thread a fiber: checks, launches and kernels are
those of csrc/cuda, only the headers of CUDA are those of tests/cuda_shim. What that finds: wrong indices, masks,
strides and dtypes, missing barriers, memory that nobody wrote.
"""

import ctypes
import mmap
from types import SimpleNamespace

import kernel_cases
import pytest
import torch
from cases import needs_gpu, needs_native
from cuda_shim.build import library_path
from kernel_cases import (
    BOUNDARY,
    FLOORS,
    LAYOUTS,
    OVER_ROWS,
    Factory,
    assert_norms_of_any_stride,
    assert_nothing,
    assert_nothing_beyond_is_touched,
    assert_same_finite,
    assert_the_first_of_equal_maxima,
    cast,
    in_slot,
    in_storage,
    run,
    write_images,
)

from densenet_efficient.kernels import CONTRACT, cuda, reference

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


class Operators(SimpleNamespace):
    """The operators by name, as a backend has them, and the device of the tensors that they take."""

    def assert_exact(self, case, dtype, *place, **options):
        kernel_cases.assert_exact(self, case, dtype, *place, device=self.device, **options)

    def arguments_of(self, case, dtype):
        return cast(case, dtype, self.device)


@pytest.fixture(scope="module")
def shim():
    library = torch.library.Library("cuda_shim", "DEF")
    for name in OPERATIONS:
        schema = getattr(torch.ops.densenet_efficient, name).default._schema
        library.define(str(schema).partition("::")[2])
    torch.ops.load_library(str(library_path()))
    yield Operators(device="cpu", **{name: getattr(torch.ops.cuda_shim, name).default for name in OPERATIONS})
    library._destroy()


@pytest.fixture(params=["shim", pytest.param("card", marks=needs_gpu)])
def operators(request):
    if request.param == "shim":
        return request.getfixturevalue("shim")
    assert cuda.obstacle(torch.device("cuda", 0)) is None
    return Operators(device="cuda", **{name: getattr(cuda, name) for name in OPERATIONS})


def factory(geometry, mean=0.0):
    return Factory(*geometry, 1, mean)


def packed_and_aligned(matrix):
    """In rows of a multiple of 16 bytes, so that they are accessed in pieces of 16 bytes."""
    rows, columns = matrix.shape
    return matrix.new_zeros(rows, -(-columns // 16) * 16)[:, :columns].copy_(matrix)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=lambda geometry: "x".join(map(str, geometry)))
@pytest.mark.parametrize("operation", OPERATIONS)
def test_operation_is_exact(operators, operation, geometry, dtype):
    case = getattr(factory(geometry), operation)()
    operators.assert_exact(case, dtype, in_slot)
    operators.assert_exact(case, dtype, packed_and_aligned)


@pytest.mark.parametrize("height", range(1, 10))
@pytest.mark.parametrize("operation", PIXELWISE)
def test_small_images(operators, operation, height):
    for width in range(1, 10):
        operators.assert_exact(getattr(factory((2, height, width, 4)), operation)(), torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [(1, 1), (2, 2), (3, 2), (3, 5), (7, 9), (1, 9), (4, 4)])
def test_windows_of_the_average_pooling(operators, window, dtype):
    for channels in (16, 17):
        images = factory((2, 7, 9, channels))
        operators.assert_exact(images.bn_relu_avg_pool(window), dtype, packed_and_aligned)
        for accumulate in (True, False):
            operators.assert_exact(images.bn_relu_avg_pool_backward(window, accumulate), dtype, packed_and_aligned)


def aligned_slot(matrix):
    """The first channels of a wider storage, whose rows all begin at a multiple of 16 bytes."""
    rows, columns = matrix.shape
    return matrix.new_full((rows, 48), BOUNDARY)[:, :columns].copy_(matrix)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [3, 12, 17, 24])  # 24 are of whole pieces of 16 bytes in every dtype
@pytest.mark.parametrize("operation", [name for name in OPERATIONS if name in OVER_ROWS])
def test_nothing_beside_an_aligned_slot_is_written(operators, operation, channels, dtype):
    images = factory((2, 4, 5, channels))
    large = [images.bn_relu_avg_pool((4, 5))] if operation == "bn_relu_avg_pool" else []  # another kernel's windows
    for case in [getattr(images, operation)(), *large]:
        for result in run(operators, case, operators.arguments_of(case, dtype), aligned_slot).values():
            if result.dim() == 2:
                assert (result._base[:, channels:] == BOUNDARY).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_nothing_beyond_the_tensors_is_touched(shim, operation, dtype):
    for channels in (3, 24):
        case = getattr(factory((2, 3, 5, channels)), operation)()
        assert_nothing_beyond_is_touched(shim, case, shim.arguments_of(case, dtype))


@pytest.mark.parametrize("operation", [name for name in OPERATIONS if name in OVER_ROWS])
def test_one_matrix_that_is_not_aligned(operators, operation):
    """Beside others that are: on a card an access of 16 bytes from any other address is a fault."""
    case = getattr(factory((2, 7, 5, 24)), operation)()
    arguments = operators.arguments_of(case, torch.bfloat16)
    expected = run(operators, case, arguments, aligned_slot)

    def beginning_elsewhere(matrix):
        return matrix.new_zeros(len(matrix), 48)[:, 1 : 1 + matrix.shape[1]].copy_(matrix)

    def of_another_stride(matrix):
        return matrix.new_zeros(len(matrix), 49)[:, : matrix.shape[1]].copy_(matrix)

    for odd in [value for name, value in arguments.items() if in_storage(name, value)]:
        for place_odd in (beginning_elsewhere, of_another_stride):

            def place(matrix, odd=odd, place_odd=place_odd):
                return place_odd(matrix) if matrix is odd else aligned_slot(matrix)

            results = run(operators, case, arguments, place)
            assert all(torch.equal(results[name], value) for name, value in expected.items())


@pytest.mark.parametrize("strides", [(841, 1, 24), (880, 1, 25)], ids=["images", "pixels"])
def test_images_or_pixels_that_are_not_aligned(operators, strides):
    images = torch.zeros(2000, dtype=torch.bfloat16, device=operators.device).as_strided((2, 24, 35), strides)
    images.copy_(torch.arange(24)[:, None])
    out, (mean, variance) = images.new_zeros(70, 24), torch.zeros(2, 24, device=operators.device)
    operators.write_with_statistics(images, out, mean, variance)
    assert out.tolist() == [list(range(24))] * 70
    assert mean.tolist() == list(range(24))


@pytest.mark.parametrize(
    ("operation", "geometry", "window"),
    [
        ("channel_stats", (1, 91, 91, 256), []),
        ("project_gradient", (1, 182, 182, 256), []),
        ("bn_relu_avg_pool", (1, 91, 91, 256), [(1, 1)]),
        ("bn_relu_avg_pool_backward", (1, 91, 91, 256), [(1, 1)]),
        ("bn_relu_max_pool", (1, 16500, 1, 256), []),
    ],
)
def test_more_rows_than_the_blocks_take_at_once(operators, operation, geometry, window):
    """So that a block works on several groups of rows, and more than 32 blocks leave their sums to be added."""
    operators.assert_exact(getattr(factory(geometry), operation)(*window), torch.float64, torch.Tensor.clone)


@pytest.mark.parametrize("layout", ["channels-last", "contiguous"])
def test_images_of_more_rows_than_the_blocks_take_at_once(operators, layout):
    write_images(
        operators, operators.arguments_of(factory((2, 91, 46, 256)).write_with_statistics(), torch.float64)["x"], layout
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_images_of_any_layout(operators, layout, dtype):
    """Written as they are, with the statistics that a pass of its own over what was written would take."""
    for geometry in GEOMETRIES:
        arguments = operators.arguments_of(factory(geometry).write_with_statistics(), dtype)
        results = write_images(operators, arguments["x"], layout)
        mean, variance = arguments["mean"], arguments["variance"]
        operators.channel_stats(results["out"], mean, variance)
        assert torch.equal(results["mean"], mean)
        assert torch.equal(results["variance"], variance)


def test_strips_of_squares(operators):
    """The maximum pooling's backward on images of several squares, and with so many that a block takes a strip."""
    operators.assert_exact(factory((1, 35, 50, 8)).bn_relu_max_pool_backward(), torch.float32)
    operators.assert_exact(factory((600, 2, 50, 1)).bn_relu_max_pool_backward(), torch.float32)


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
def test_results_that_nobody_needs(operators, operation, unneeded, dtype):
    operators.assert_exact(getattr(factory((2, 5, 4, 32)), operation)().without(*unneeded), dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_means_far_from_zero(operators, operation, dtype):
    case = getattr(factory((2, 9, 8, 33), mean=1e3), operation)()
    operators.assert_exact(case, dtype, floors={torch.float64: 1e-12, torch.float32: 2e-5})


def test_statistics_far_from_zero(operators):
    """Mean 1e3, standard deviation 1: what the difference of two sums of squares would get wrong by 5 %."""
    case = factory((2, 33, 47, 17), mean=1e3).channel_stats()
    arguments = operators.arguments_of(case, torch.float32)
    results = run(operators, case, arguments)
    variance, mean = torch.var_mean(arguments["x"].double(), 0, correction=0)
    torch.testing.assert_close(results["mean"].double(), mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(results["variance"].double(), variance, rtol=2e-5, atol=0)


def test_statistics_of_a_constant(operators):
    x = torch.full((700, 9), 1e3 / 3, device=operators.device)
    mean, variance = x.new_empty(9), x.new_empty(9)
    operators.channel_stats(x, mean, variance)
    assert (mean == x[0]).all()
    assert (variance == 0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("operation", [name for name in OPERATIONS if name in OVER_ROWS])
def test_non_finite_values_come_out(operators, operation, value, dtype):
    case = getattr(factory((2, 7, 5, 19)), operation)()
    for name in {"x", "out_grad"} & case.arguments.keys():
        arguments = operators.arguments_of(case, dtype)
        arguments[name] = arguments[name].clone()
        arguments[name][1, 2] = arguments[name][-1, 3] = value
        expected = run(reference, case, arguments)
        assert_same_finite(run(operators, case, arguments), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_same_bits_whatever_the_alignment(operators, operation, dtype):
    """And whatever the order in which a block's threads run, which differs from call to call."""
    case = getattr(factory((2, 17, 15, 40)), operation)()
    arguments = operators.arguments_of(case, dtype)
    results = [run(operators, case, arguments, place) for place in (in_slot, packed_and_aligned, packed_and_aligned)]
    for other in results[1:]:
        assert all(torch.equal(other[name], value) for name, value in results[0].items())


@pytest.mark.parametrize("operation", [name for name in OPERATIONS if name in OVER_ROWS])
def test_no_images(operators, operation):
    """An empty batch: what is summed over it is zero, and so are its statistics."""
    case = getattr(factory((0, 4, 6, 5)), operation)()
    results = run(operators, case, operators.arguments_of(case, torch.float32))
    assert_nothing(results)


@pytest.mark.parametrize("statistics", DTYPES, ids=str)
@pytest.mark.parametrize("parameters", DTYPES, ids=str)
def test_statistics_and_parameters_of_any_dtype(operators, statistics, parameters):
    case = factory((1, 1, 1, 37)).batch_norm_affine()
    arguments = operators.arguments_of(case, torch.float32)
    for names, dtype in ((("mean", "variance"), statistics), (("weight", "bias"), parameters)):
        arguments |= {name: arguments[name].to(dtype) for name in names}
    expected = run(reference, case, arguments)["affine"]
    torch.testing.assert_close(run(operators, case, arguments)["affine"], expected, rtol=1e-6, atol=1e-6)


def test_the_first_of_equal_maxima(operators):
    assert_the_first_of_equal_maxima(operators, operators.device)


def test_norms_of_any_stride(operators):
    assert_norms_of_any_stride(operators, operators.device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activations_that_their_storage_rounds_to_zero(operators, dtype):
    """Their gradient is masked as that of any other zero."""
    smallest = 2.0 ** {torch.float16: -24, torch.bfloat16: -133, torch.float32: -149, torch.float64: -1074}[dtype]
    shift = torch.tensor([0.5, 0.625, 1, -1, 0], dtype=torch.float64) * smallest
    case = factory((1, 1, 1, 5)).bn_relu_avg_pool_backward((1, 1), accumulate=False)
    arguments = operators.arguments_of(case._replace(arguments=case.arguments | {"shift": shift}), dtype)
    arguments["x"].zero_()
    expected = run(reference, case, arguments)
    results = run(operators, case, arguments)
    assert torch.equal(results["grad"] == 0, expected["grad"] == 0)
    assert torch.equal(results["sum_grad"] == 0, expected["sum_grad"] == 0)


def test_a_dtype_that_no_storage_has(operators):
    with pytest.raises(TypeError, match="expected float32, float64, bfloat16 or float16, got Int"):
        operators.channel_stats(
            *(torch.zeros(size, dtype=torch.int32, device=operators.device) for size in [(3, 4), 4, 4])
        )


def test_a_dtype_that_no_norm_has(operators):
    vector, affine = torch.ones(4, dtype=torch.int32, device=operators.device), torch.empty(4, 4)
    with pytest.raises(TypeError, match="expected float32, float64, bfloat16 or float16, got Int"):
        operators.batch_norm_affine(vector, vector, vector, vector, 1e-5, affine.to(operators.device))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_impossible_arguments(operators, operation):
    case = getattr(factory((2, 4, 6, 5)), operation)()
    arguments = operators.arguments_of(case, torch.float32)
    for name, value in arguments.items():
        if not isinstance(value, torch.Tensor):
            continue
        for wrong in (value.new_zeros([size + 1 for size in value.shape]), value.unsqueeze(0)):
            with pytest.raises(RuntimeError, match="must"):
                getattr(operators, operation)(**arguments | {name: wrong})


@pytest.mark.parametrize(
    ("operation", "changes", "message"),
    [
        ("batch_norm_gradients", {"offset": lambda offset: None}, "slope and offset must be given together"),
        ("batch_norm_gradients", {"count": lambda count: 0}, "count must be positive, got 0"),
        ("batch_norm_affine", {"affine": lambda affine: affine.t().contiguous().t()}, "affine must be contiguous"),
        ("batch_norm_affine", {"affine": torch.Tensor.bfloat16}, "affine must be float32 or float64"),
        ("bn_relu_avg_pool", {"window_height": lambda height: 5}, "fits the images of 4x6, got 5x2"),
        ("bn_relu_avg_pool_backward", {"window_width": lambda width: 0}, "fits the images of 4x6, got 2x0"),
        ("channel_stats", {"x": lambda x: x.t().contiguous().t()}, "x must have unit column stride"),
        ("channel_stats", {"x": lambda x: x[0].expand(48, 5)}, "x must have rows that do not overlap"),
    ],
)
def test_arguments_that_do_not_fit(operators, operation, changes, message):
    arguments = operators.arguments_of(getattr(factory((2, 4, 6, 5)), operation)(), torch.float32)
    with pytest.raises(RuntimeError, match=message):
        getattr(operators, operation)(**arguments | {name: of(arguments[name]) for name, of in changes.items()})


@pytest.mark.parametrize("operation", PIXELWISE)
@pytest.mark.parametrize("size", [{"height": 5}, {"height": 0}, {"width": -6, "height": -4}])
def test_rows_that_are_no_images(operators, operation, size):
    case = getattr(factory((2, 4, 6, 5)), operation)()
    with pytest.raises(RuntimeError, match="one row per pixel"):
        getattr(operators, operation)(**operators.arguments_of(case, torch.float32) | size)


def test_more_pixels_than_kernels_count(operators):
    """Without channels they take no memory."""
    x, vector = torch.empty(2**31, 0, device=operators.device), torch.empty(0, device=operators.device)
    images, size = x.view(2**16, 2**15, 0).transpose(1, 2), (2**15, 2**16)
    for name, arguments in {
        "write_with_statistics": (images, x, vector, vector),
        "bn_relu_avg_pool": (x, vector, vector, *size, 1, 1, x),
        "bn_relu_avg_pool_backward": (x, x, vector, vector, vector, *size, 1, 1, x, False, vector, vector),
        "bn_relu_max_pool": (x, vector, vector, *size, x[: 2**29]),
        "bn_relu_max_pool_backward": (x[: 2**29], x, vector, vector, vector, *size, x, vector, vector),
    }.items():
        with pytest.raises(RuntimeError, match="at most 2147481600 pixels, got 2147483648; use a smaller batch"):
            getattr(operators, name)(*arguments)


def test_the_mathematics_on_vectors(shim):
    """As the CPU kernels have them: csrc/batch_norm.h is written once."""
    assert ctypes.CDLL(str(library_path())).vectors_agree_with_numbers()


def reserved(elements, like):
    """Memory of which the pages that are touched exist: on the CPU torch would fill it."""
    if like.is_cuda:
        return like.new_empty(elements)
    return torch.frombuffer(mmap.mmap(-1, elements * like.dtype.itemsize), dtype=like.dtype)


@pytest.mark.large
@pytest.mark.parametrize("operation", [name for name in OPERATIONS if name in OVER_ROWS])
def test_more_than_2_to_the_31_elements_in_one_storage(operators, operation):
    """The last row of each matrix lies beyond."""

    def place(matrix):
        rows = len(matrix)
        stride = 2**31 // (rows - 1) // 64 * 64 + 64
        assert (rows - 1) * stride > 2**31
        return reserved(rows * stride, matrix).as_strided(matrix.shape, (stride, 1)).copy_(matrix)

    case = getattr(factory((1, 8, 10, 24)), operation)()
    arguments = operators.arguments_of(case, torch.bfloat16)
    expected = run(operators, case, arguments)
    results = run(operators, case, arguments, place)
    assert all(torch.equal(results[name], value) for name, value in expected.items())
    del results
    if operators.device == "cuda":
        torch.cuda.empty_cache()  # other processes test on this card too


@pytest.mark.large
@pytest.mark.parametrize("strides", [(2**30, 3, 1), (3, 2**30, 1), (3, 1, 2**30)], ids=str)
def test_images_of_more_than_2_to_the_31_elements(operators, strides):
    """Between images, between channels or between pixels."""
    x = reserved(2**31 + 16, torch.empty(0, dtype=torch.bfloat16, device=operators.device))
    images = x.as_strided((3, 3, 3), strides)
    numbers = torch.arange(27, device=operators.device).view(3, 3, 3)
    images.copy_(numbers)
    out, (mean, variance) = images.new_empty(9, 3), torch.empty(2, 3, device=operators.device)
    operators.write_with_statistics(images, out, mean, variance)
    assert torch.equal(out, numbers.transpose(1, 2).reshape(9, 3).bfloat16())
    assert mean.tolist() == [10, 13, 16]


# ---- on a card alone


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "geometry", [(8, 56, 56, 352), (16, 14, 14, 896), (16, 7, 7, 1920), (4, 112, 112, 64)], ids=str
)
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("operators", ["card"], indirect=True)
def test_sizes_of_densenets(operators, operation, geometry, dtype):
    case = getattr(factory(geometry), operation)()
    operators.assert_exact(case, dtype, packed_and_aligned, floors=FLOORS | {torch.float64: 1e-11, torch.float32: 1e-5})


@needs_gpu
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("operators", ["card"], indirect=True)
def test_a_captured_graph_and_another_stream(operators, operation):
    """A replay of the graph gives the bits of the call, and so does a call on a stream that is not the default."""
    case = getattr(factory((2, 17, 15, 40)), operation)()
    arguments = operators.arguments_of(case, torch.bfloat16)
    expected = run(operators, case, arguments)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        on_stream = run(operators, case, arguments)
    torch.cuda.current_stream().wait_stream(stream)
    written = {name: arguments[name] for name in case.written}
    before = {name: value.clone() for name, value in written.items()}
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        getattr(operators, operation)(**arguments)
    for name, value in written.items():  # in case the capture had run it
        value.copy_(before[name])
    graph.replay()
    for name, value in expected.items():
        assert torch.equal(on_stream[name], value)
        assert torch.equal(written[name], value)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_device_that_is_not_the_current_one(operation):
    elsewhere = Operators(device="cuda:1", **{name: getattr(cuda, name) for name in OPERATIONS})
    elsewhere.assert_exact(getattr(factory((2, 5, 4, 32)), operation)(), torch.float32)
