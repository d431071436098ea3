"""Every operation of the contract on the native CPU backend, against the formulas in plain torch.

In float64 they agree; in float32, bfloat16 and float16 the native error against float64 is at most twice that of
plain torch in the same dtype, plus a floor of `FLOORS`.
"""

import functools
import os
import subprocess
import sys
from pathlib import Path

import kernel_cases
import pytest
import torch
from cases import needs_native
from kernel_cases import (
    LAYOUTS,
    OVER_ROWS,
    UNNEEDED,
    Factory,
    assert_norms_of_any_stride,
    assert_nothing,
    assert_same_finite,
    assert_statistics_of_stored,
    assert_the_first_of_equal_maxima,
    cast,
    run,
    write_images,
)
from processes import run_tests

from densenet_efficient import kernels
from densenet_efficient.kernels import CONTRACT, cpu, reference

pytestmark = pytest.mark.usefixtures("one_thread")
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# images, height, width, input channels, output channels
GEOMETRIES = [
    (1, 1, 1, 1, 1),
    (1, 1, 2, 3, 3),
    (2, 2, 1, 12, 17),
    (1, 3, 3, 17, 12),
    (2, 5, 4, 32, 48),
    (3, 7, 6, 48, 32),
    (2, 9, 8, 150, 12),
    (1, 8, 9, 513, 48),
    (1, 4, 9, 33, 150),
    (4, 7, 7, 128, 32),
    (1, 33, 47, 64, 128),
    (2, 1, 300, 24, 16),
    (2, 2, 3, 1, 513),
]

assert_exact = functools.partial(kernel_cases.assert_exact, cpu)


def test_native_backend_was_built():
    """Everything below is about it, so its absence is a failure and no reason to skip."""
    assert cpu.is_available(), cpu.obstacle()


def test_every_operation_has_a_case():
    assert all(hasattr(Factory, operation) for operation in CONTRACT)


@pytest.mark.each_capability
@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=lambda geometry: "x".join(map(str, geometry)))
@pytest.mark.parametrize("operation", CONTRACT)
def test_operation_is_exact(operation, geometry, dtype):
    assert_exact(getattr(Factory(*geometry), operation)(), dtype)


@needs_native
@pytest.mark.parametrize("operation", CONTRACT)
def test_packed_matrices(operation):
    for dtype in DTYPES:
        assert_exact(getattr(Factory(2, 7, 5, 24, 16), operation)(), dtype, place=torch.Tensor.clone)


@needs_native
@pytest.mark.parametrize("height", range(1, 10))
@pytest.mark.parametrize("operation", [name for name in CONTRACT if "3x3" in name or "pool" in name])
def test_small_images(operation, height):
    for width in range(1, 10):
        case = getattr(Factory(2, height, width, 12, 5), operation)()
        assert_exact(case, torch.float64)
        assert_exact(case, torch.bfloat16)


@pytest.mark.each_capability
@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_images_of_any_layout(layout, dtype):
    """Written as they are, with the statistics that a pass of its own over what was written would take."""
    for geometry in GEOMETRIES:
        arguments = cast(Factory(*geometry).write_with_statistics(), dtype)
        results = write_images(cpu, arguments["x"], layout)
        mean, variance = arguments["mean"], arguments["variance"]
        cpu.channel_stats(results["out"], mean, variance)
        assert torch.equal(results["mean"], mean)
        assert torch.equal(results["variance"], variance)


@pytest.mark.each_capability
@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("geometry", [(9, 4, 5, 3, 2), (1, 120, 130, 3, 2), (1, 2, 1100, 3, 2)], ids=str)
@pytest.mark.parametrize("operation", ["bn_relu_conv3x3", "bn_relu_conv3x3_backward"])
def test_tiles_of_several_images_many_tiles_and_wide_ones(operation, geometry, dtype):
    assert_exact(getattr(Factory(*geometry), operation)(), dtype)


@pytest.mark.each_capability
@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operation", ["bn_relu_conv3x3", "bn_relu_conv3x3_backward"])
def test_weights_with_their_channels_last(operation, dtype):
    """And their gradients."""
    for geometry in GEOMETRIES[3:8]:
        case = getattr(Factory(*geometry), operation)()
        weight = case.arguments["weight"].contiguous(memory_format=torch.channels_last)
        weights = {name: weight for name in ("weight", "grad_weight") if name in case.arguments}
        assert_exact(case._replace(arguments=case.arguments | weights), dtype)


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [(1, 1), (2, 2), (3, 2), (7, 9), (1, 9)])
def test_windows_of_the_average_pooling(window, dtype):
    factory = Factory(2, 7, 9, 17, 1)
    assert_exact(factory.bn_relu_avg_pool(window), dtype)
    assert_exact(factory.bn_relu_avg_pool_backward(window, accumulate=False), dtype)


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operation", ["bn_relu_conv3x3_backward", "bn_relu_avg_pool_backward"])
def test_gradient_is_assigned_where_it_does_not_accumulate(operation, dtype):
    for geometry in GEOMETRIES[3:7]:
        assert_exact(getattr(Factory(*geometry), operation)(accumulate=False), dtype)


@pytest.mark.each_capability
@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("operation", "unneeded"), UNNEEDED, ids=str)
def test_results_that_nobody_needs(operation, unneeded, dtype):
    for geometry in GEOMETRIES[3:8]:
        assert_exact(getattr(Factory(*geometry), operation)().without(*unneeded), dtype)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("operation", CONTRACT)
def test_means_far_from_zero(operation, dtype):
    case = getattr(Factory(2, 9, 8, 33, 12, mean=1e3), operation)()
    assert_exact(case, dtype, floors={torch.float64: 1e-12, torch.float32: 3e-5})  # 2e-5 with fused multiply-adds


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operation", ["bn_relu_conv1x1", "bn_relu_conv3x3"])
def test_statistics_are_those_of_the_stored_values(operation, dtype):
    """To the accuracy of their own dtype, also where rounding has moved the values."""
    for geometry in GEOMETRIES[2:]:
        case = getattr(Factory(*geometry), operation)()
        assert_statistics_of_stored(run(cpu, case, cast(case, dtype)))


@needs_native
def test_statistics_far_from_zero():
    """Mean 1e3, standard deviation 1: what the difference of two sums of squares would get wrong by 5 %."""
    case = Factory(2, 33, 47, 17, 1, mean=1e3).channel_stats()
    arguments = cast(case, torch.float32)
    results = run(cpu, case, arguments)
    variance, mean = torch.var_mean(arguments["x"].double(), 0, correction=0)
    torch.testing.assert_close(results["mean"].double(), mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(results["variance"].double(), variance, rtol=2e-5, atol=0)


@needs_native
def test_statistics_of_one_tile_far_from_zero():
    """Whose second pass corrects the mean of the first, which alone would get the variance wrong by a thousandth."""
    x = torch.randn(128, 33, generator=torch.Generator().manual_seed(0)) + 1e5
    mean, variance = torch.empty(2, 33)
    cpu.channel_stats(x, mean, variance)
    torch.testing.assert_close(variance.double(), x.double().var(0, correction=0), rtol=1e-5, atol=0)


@needs_native
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("operation", [name for name in CONTRACT if "conv" in name])
def test_float32_weights_beside_low_precision_activations(operation, dtype):
    """As autocast keeps them."""
    case = getattr(Factory(2, 7, 6, 48, 32), operation)()
    arguments = cast(case, dtype)
    expected = run(cpu, case, arguments)
    results = run(cpu, case, arguments | {"weight": arguments["weight"].float()})
    for name, value in expected.items():
        torch.testing.assert_close(results[name], value)


@pytest.mark.each_capability
@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("operation", OVER_ROWS)
def test_non_finite_values_come_out(operation, value, dtype):
    case = getattr(Factory(2, 7, 5, 19, 13), operation)()
    for name in ("x", "out_grad"):
        if name not in case.arguments:
            continue
        arguments = cast(case, dtype)
        arguments[name] = arguments[name].clone()
        arguments[name][1, 2] = value
        assert_same_finite(run(cpu, case, arguments), run(reference, case, arguments))


@pytest.mark.each_capability
@needs_native
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("operation", [name for name in OVER_ROWS if name.endswith("backward")])
def test_a_relu_lets_pass_what_is_positive_or_nan(operation, dtype):
    """At zero nothing passes."""
    case = getattr(Factory(2, 7, 5, 19, 13), operation)()
    arguments = cast(case, dtype)
    activation = arguments["x"].clamp(-1, 1).round()
    assert (activation == 0).any()
    activation[:9] = torch.nan  # of several pixels in a window
    arguments |= {"x": activation, "scale": torch.ones(19, dtype=dtype), "shift": torch.zeros(19, dtype=dtype)}
    results, expected = run(cpu, case, arguments), run(reference, case, arguments)
    for name in ("grad", "sum_grad"):
        assert expected[name].isfinite().all()
        torch.testing.assert_close(results[name], expected[name])


@needs_native
@pytest.mark.parametrize("operation", [name for name in CONTRACT if "conv" in name])
def test_no_pair_of_bfloat16_is_flushed_as_a_denormal_float(operation):
    """Two values in 32 bits are one where the second is zero, as half of the activations are."""
    case = getattr(Factory(2, 5, 4, 32, 48), operation)()
    expected = run(cpu, case, cast(case, torch.bfloat16))
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush denormal numbers")
    try:
        flushed = run(cpu, case, cast(case, torch.bfloat16))
    finally:
        torch.set_flush_denormal(False)
    assert all(torch.equal(flushed[name], value) for name, value in expected.items())


@pytest.mark.each_capability
@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operation", CONTRACT)
def test_the_same_bits_in_every_run_and_with_any_number_of_threads(operation, dtype):
    """Of several tiles, of many channels, of what is a single task, and of more threads than groups of rows."""
    of_tiles, of_channels, of_threads = (2, 33, 31, 40, 24), (4, 7, 7, 513, 48), (2, 31, 17, 130, 16)
    for geometry in [of_tiles, of_channels, (1, 2, 9, 128, 32), (2, 17, 1, 16, 128), of_threads]:
        case = getattr(Factory(*geometry), operation)()
        arguments = cast(case, dtype)
        results = []
        for number in (1, 2, 2, 3):
            torch.set_num_threads(number)
            results.append(run(cpu, case, arguments))
        for other in results[1:]:
            assert all(torch.equal(other[name], value) for name, value in results[0].items())


@needs_native
def test_norms_of_any_stride():
    assert_norms_of_any_stride(cpu)


@pytest.mark.each_capability
@needs_native
def test_the_first_of_equal_maxima():
    assert_the_first_of_equal_maxima(cpu)


@needs_native
@pytest.mark.parametrize("operation", [name for name in CONTRACT if "conv" in name])
def test_no_channels(operation):
    case = getattr(Factory(2, 4, 6, 0, 3), operation)()
    with pytest.raises(RuntimeError, match="weight must have input channels, got"):
        run(cpu, case, cast(case, torch.float32))


def test_the_statistics_of_the_reference():
    """As exact as their dtype; of no rows zero, where those of torch are NaN."""
    x = (torch.randn(500, 3) + 20).bfloat16()
    mean, variance = torch.empty(2, 3)
    reference.channel_stats(x, mean, variance)
    expected = x.double().mean(0).float(), x.double().var(0, correction=0).float()
    torch.testing.assert_close((mean, variance), expected)
    reference.channel_stats(x[:0], mean, variance)
    assert not mean.any() and not variance.any()


@needs_native
@pytest.mark.parametrize("operation", OVER_ROWS)
def test_no_images(operation):
    """An empty batch: what is summed over it is zero, and so are its statistics."""
    case = getattr(Factory(0, 4, 6, 5, 3), operation)()
    results = run(cpu, case, cast(case, torch.float32))
    assert_nothing(results)


# A row stride of 2^25 elements puts the last row of pixels of 7x11 beyond 2^31; of each pixel a page is touched.
@pytest.mark.large
@needs_native
@pytest.mark.parametrize("channels", [24, 48])
@pytest.mark.parametrize("operation", CONTRACT)
def test_more_than_2_to_the_31_elements_in_one_storage(operation, channels):
    rows, stride = 77, 2**25
    storages = {}

    def place(matrix):
        name = len(storages)
        storages[name] = torch.empty(rows * stride, dtype=torch.bfloat16)
        view = storages[name].as_strided((matrix.shape[0], matrix.shape[1]), (stride, 1))
        return view.copy_(matrix)

    case = getattr(Factory(1, 7, 11, channels, channels * 2 // 3), operation)()
    assert (rows - 11) * stride > 2**31
    arguments = cast(case, torch.bfloat16)
    expected = run(cpu, case, arguments)
    results = run(cpu, case, arguments, place)
    assert all(torch.equal(results[name], value) for name, value in expected.items())


# Arguments of any floating dtype.
ANY_DTYPE = dict.fromkeys(CONTRACT, ("weight",)) | {
    "batch_norm_affine": ("mean", "variance", "weight", "bias", "affine")
}
# Those that the others are held against, so that what does not fit them may be named.
LEADING = ("x", "weight", "sum_grad")


def spoiled(operation, arguments):
    """(name, arguments) with one argument wrong each, in shape, dtype, stride or device."""
    for name, value in arguments.items():
        if not isinstance(value, torch.Tensor):
            continue
        yield name, "shape", value.new_zeros([size + 1 for size in value.shape])
        yield name, "rank", value.unsqueeze(0)
        yield name, "device", value.to("meta")
        if name not in ANY_DTYPE[operation]:
            yield name, "dtype", value.to(torch.float64 if value.dtype != torch.float64 else torch.float32)
        if value.dim() == 1 and operation != "batch_norm_affine":
            yield name, "stride", value.repeat_interleave(2)[::2]
        if value.dim() == 2 or (value.dim() == 4 and name != "weight"):
            yield name, "stride", value.transpose(0, 1).contiguous().transpose(0, 1)
        if value.dim() == 2:
            yield name, "overlap", value[:1].expand(value.shape)


@needs_native
@pytest.mark.parametrize("operation", CONTRACT)
def test_impossible_arguments(operation):
    case = getattr(Factory(2, 4, 6, 5, 3), operation)()
    arguments = cast(case, torch.float32)
    for name, wrong, value in spoiled(operation, arguments):
        named = "" if name in LEADING else f"{name} "
        message = None if wrong == "device" else f"{named}must"
        with pytest.raises(RuntimeError, match=message):
            getattr(cpu, operation)(**arguments | {name: value})


@needs_native
@pytest.mark.parametrize(
    ("operation", "changed", "message"),
    [
        ("bn_relu_conv1x1_backward", {"sum_grad_x": None}, "must be given together"),
        ("bn_relu_conv3x3_backward", {"sum_grad": None}, "must be given together"),
        ("bn_relu_conv1x1_backward", {"sum_grad": None, "sum_grad_x": None}, "grad needs sum_grad and sum_grad_x"),
        ("bn_relu_conv3x3_backward", {"sum_grad": None, "sum_grad_x": None}, "grad needs sum_grad and sum_grad_x"),
        ("batch_norm_gradients", {"offset": None}, "must be given together"),
        ("batch_norm_gradients", {"count": 0}, "count must be positive, got 0"),
        ("bn_relu_avg_pool", {"window_height": 0}, "Expected a window that fits"),
        ("bn_relu_avg_pool_backward", {"window_width": 7}, "Expected a window that fits"),
    ],
)
def test_arguments_that_do_not_go_together(operation, changed, message):
    case = getattr(Factory(2, 4, 6, 5, 3), operation)()
    with pytest.raises(RuntimeError, match=message):
        getattr(cpu, operation)(**cast(case, torch.float32) | changed)


@needs_native
@pytest.mark.parametrize("operation", [name for name in CONTRACT if "3x3" in name or "pool" in name])
@pytest.mark.parametrize(
    "size", [{"height": 5}, {"height": 0}, {"width": -6, "height": -4}, {"height": 2**32, "width": 2**32}]
)
def test_rows_that_are_no_images(operation, size):
    case = getattr(Factory(2, 4, 6, 5, 3), operation)()
    with pytest.raises((RuntimeError, ValueError), match=r"row.*images|height|width"):
        getattr(cpu, operation)(**cast(case, torch.float32) | size)


CAPABILITIES = ["default", "avx2", "avx512", "avx512_bf16", "amx"]


@needs_native
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_compiled_cpu_capability(capability):
    """The choice is made once per process, so tests from above run again in a new one.

    There, what glibc's malloc gives to the kernels' scratch is not zero by chance but huge.
    """
    from densenet_efficient import _C

    if capability not in _C.build_info()["cpu_capabilities"]:
        pytest.skip(f"{capability} is not compiled for this architecture")
    environment = os.environ | {"DENSENET_EFFICIENT_CPU_CAPABILITY": capability, "MALLOC_PERTURB_": "128"}
    used = run_python(["-c", "from densenet_efficient import _C; print(_C.cpu_capability())"], environment)
    if "not supported by this CPU" in used.stderr:
        pytest.skip(f"this CPU does not support {capability}")
    assert used.stdout.split() == [capability], used.stderr
    others = ["test_skipped_zeros.py", "test_inference_stem.py"]
    files = [__file__, *(str(Path(__file__).with_name(name)) for name in others)]
    run_tests(["-x", *files, "-m", "each_capability"], environment)


def run_python(arguments, environment):
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False)


def test_unknown_cpu_capability():
    result = run_python(
        ["-c", "from densenet_efficient import _C; _C.cpu_capability()"],
        os.environ | {"DENSENET_EFFICIENT_CPU_CAPABILITY": "avx1024"},
    )
    assert result.returncode != 0
    assert "avx1024" in result.stderr


def test_a_requested_backend_works_or_raises(monkeypatch):
    monkeypatch.setenv(kernels.BACKEND_VARIABLE, "reference")
    assert kernels.backend_name("cpu") == "reference"
    monkeypatch.setenv(kernels.BACKEND_VARIABLE, "fastest")
    with pytest.raises(ValueError, match=r"fastest.*cpu.*reference"):
        kernels.backend_name("cpu")
    monkeypatch.setenv(kernels.BACKEND_VARIABLE, "cpu")
    with pytest.raises(RuntimeError, match="meta"):
        kernels.backend_name("meta")
    monkeypatch.setattr(cpu, "_unavailable_reason", "it was not built")
    with pytest.raises(RuntimeError, match="it was not built"):
        kernels.backend_name("cpu")


def test_a_missing_native_backend_is_announced_once(monkeypatch):
    monkeypatch.delenv(kernels.BACKEND_VARIABLE, raising=False)
    monkeypatch.setattr(cpu, "_unavailable_reason", "it was not built for this test")
    with pytest.warns(RuntimeWarning, match=r"it was not built for this test.*Remedy") as warnings:
        assert [kernels.backend_name("cpu") for _ in range(3)] == ["reference"] * 3
    assert len(warnings) == 1
