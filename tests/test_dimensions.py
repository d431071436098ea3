"""DenseNets of one and three dimensions, other kernel sizes and dilations, held to what the naive model gives."""

import copy

import pytest
import torch
from cases import (
    CPU_BACKENDS,
    GPU_BACKENDS,
    LEVELS,
    MODES,
    VARIANTS,
    assert_close,
    group_errors,
    loss_of,
    make_images,
    make_pair,
    randomise,
    set_mode,
    step,
    trained,
    use_backend,
)
from test_bad_input import assert_one_line, error_of
from test_exactness import assert_errors_at_most_twice, assert_same_steps, block_step, low_precision_step
from torch import nn

from densenet_efficient import DenseBlock, DenseLayer, EfficientDenseNet, EfficientDenseNet121, Transition
from densenet_efficient.dimensions import (
    AVG_POOLS,
    BATCH_NORMS,
    CONVOLUTIONS,
    MAX_POOLS,
    dims_of,
    global_average,
    is_for,
)
from densenet_efficient.reference import NaiveDenseBlock

pytestmark = pytest.mark.usefixtures("one_thread", "nan_memory")

every_level = pytest.mark.parametrize("level", LEVELS)
every_variant = pytest.mark.parametrize("variant", VARIANTS)
other_dims = pytest.mark.parametrize("dims", [1, 3])
SIZES = {1: (70,), 3: (18, 21, 19)}  # of images for the stem of ImageNet; odd where a pooling leaves a rest
SMALL_SIZES = {1: (13,), 3: (5, 4, 7)}


@pytest.fixture(params=[*CPU_BACKENDS, *GPU_BACKENDS])
def backend(request, monkeypatch):
    yield from use_backend(request.param, monkeypatch)


@every_level
@every_variant
@other_dims
@pytest.mark.parametrize("mode", [*MODES, "mixed"])
def test_float64(backend, dims, variant, level, mode):
    pair = make_pair(mode=mode, checkpointing=level, spatial_dims=dims, **VARIANTS[variant])
    assert_same_steps(pair, make_images(3, 3, *SIZES[dims]), steps=2)


@every_level
@other_dims
@pytest.mark.parametrize("bottleneck", [True, False])
def test_small_inputs_and_dropout(backend, dims, level, bottleneck):
    arguments = {"small_inputs": True, "drop_rate": 0.3, "bottleneck": bottleneck, "spatial_dims": dims}
    pair = make_pair(checkpointing=level, **arguments)
    assert_same_steps(pair, make_images(3, 3, *SMALL_SIZES[dims]), steps=2, seed=5)


def test_volumes_as_deep_as_a_window(backend):
    """At the second transition, where their planes are larger than the window."""
    pair = make_pair(small_inputs=True, block_config=(2, 2, 1), spatial_dims=3)
    assert_same_steps(pair, make_images(3, 3, 4, 8, 6), steps=2)


def test_modules_tell_their_dimensions():
    class Own(torch.nn.BatchNorm3d):
        pass

    for dims, kinds in enumerate(zip(BATCH_NORMS.values(), CONVOLUTIONS.values(), strict=True), start=1):
        norm, conv = kinds[0](2), kinds[1](2, 2, 3)
        assert dims_of(norm) == dims_of(conv) == dims_of(MAX_POOLS[dims](2)) == dims_of(AVG_POOLS[dims](2)) == dims
        assert is_for(norm, dims) and is_for(torch.nn.SyncBatchNorm(2), dims) and not is_for(norm, dims % 3 + 1)
    assert dims_of(Own(2)) == 3


@pytest.mark.parametrize(
    ("dims", "kinds"),
    [
        (1, (nn.Conv1d, nn.BatchNorm1d, nn.MaxPool1d, nn.AvgPool1d)),
        (2, (nn.Conv2d, nn.BatchNorm2d, nn.MaxPool2d, nn.AvgPool2d)),
        (3, (nn.Conv3d, nn.BatchNorm3d, nn.MaxPool3d, nn.AvgPool3d)),
    ],
)
def test_networks_are_made_of_torchs_modules(dims, kinds):
    features = EfficientDenseNet(4, (1, 1), 6, spatial_dims=dims).features
    found = (features.conv0, features.norm0, features.pool0, features.transition1.pool)
    assert tuple(type(module) for module in found) == kinds


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_the_global_average_is_of_what_is_above_zero(dims):
    features = torch.randn(2, 3, *(4, 5, 6)[:dims], dtype=torch.float64)
    torch.testing.assert_close(global_average(features, dims), features.clamp(min=0).flatten(2).mean(2))


@other_dims
def test_other_layouts(backend, dims):
    pair = make_pair(spatial_dims=dims)
    size = SIZES[dims]
    assert_same_steps(pair, make_images(2, *size, 3).movedim(-1, 1))
    assert_same_steps(pair, make_images(2, 3, *(2 * length for length in size))[(..., *[slice(None, None, 2)] * dims)])


def test_channels_last_models(backend):
    pair = make_pair(spatial_dims=3)
    images = make_images(2, 3, *SIZES[3]).contiguous(memory_format=torch.channels_last_3d)
    assert_same_steps([model.to(memory_format=torch.channels_last_3d) for model in pair], images)


@other_dims
def test_three_steps_of_training(backend, dims):
    naive, efficient = make_pair(spatial_dims=dims)
    images = make_images(3, 3, *SIZES[dims])
    assert_close(trained(efficient, images), trained(naive, images))


@other_dims
def test_inference(backend, dims):
    naive, efficient = make_pair(mode="eval", spatial_dims=dims)
    images = make_images(2, 3, *SIZES[dims])
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            assert_close({"": efficient(images)}, {"": naive(images)})
    assert efficient(images[:0]).shape == (0, 5)


@other_dims
def test_means_far_from_zero(backend, dims):
    pair = make_pair(spatial_dims=dims, small_inputs=True)
    assert_same_steps(pair, make_images(3, 3, *SMALL_SIZES[dims], mean=1e3))


@other_dims
@pytest.mark.parametrize(("dtype", "floor"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=str)
def test_low_precision(backend, dims, dtype, floor):
    """In bfloat16 without a transition or maximum pooling, which torch itself has not in three dimensions on a CPU."""
    arguments = {"block_config": (4,), "small_inputs": True} if dtype == torch.bfloat16 else {}
    size = (SMALL_SIZES if arguments else SIZES)[dims]
    errors = []
    for seed in range(5):
        pair = make_pair(seed, torch.float32, spatial_dims=dims, **arguments)
        images = make_images(3, 3, *size, seed=seed, dtype=torch.float32)
        truth = step(copy.deepcopy(pair[0]).double(), images.double())
        errors.append([group_errors(low_precision_step(model, images, dtype, False), truth) for model in pair])
    assert_errors_at_most_twice(errors, floor)


def block_pair(dims, bottleneck, level, mode, kernel_size=3, dilations=(1, 1, 1)):
    layers = len(dilations)
    naive = NaiveDenseBlock(layers, 7, 4, 3, 0.0, bottleneck, dims, kernel_size, dilations).double()
    efficient = DenseBlock(
        layers, 7, 3, 4, 0.0, bottleneck, level, spatial_dims=dims, kernel_size=kernel_size, dilation=dilations
    ).double()
    randomise(naive)
    efficient.load_state_dict(naive.state_dict())
    return set_mode(naive, mode), set_mode(efficient, mode)


KERNELS = [(1, (1, 1, 1)), (3, (2, 1, 4)), (5, (1, 2, 1)), (3, (7, 7, 7))]


@every_level
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("bottleneck", [True, False])
@pytest.mark.parametrize(("kernel_size", "dilations"), KERNELS, ids=str)
def test_kernel_sizes_and_dilations(backend, dims, bottleneck, level, kernel_size, dilations):
    naive, efficient = block_pair(dims, bottleneck, level, "mixed", kernel_size, dilations)
    images = make_images(2, 7, *(9, 6, 5)[:dims])
    assert_close(block_step(efficient, images), block_step(naive, images))
    assert_close({"": efficient.forward_by_layers(images)}, {"": naive(images)})
    with torch.no_grad():
        assert_close({"": set_mode(efficient, "eval")(images)}, {"": set_mode(naive, "eval")(images)})


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("frozen", ["norm1.weight", "norm1", "conv1", "norm2", "conv2", ""])
def test_frozen_parameters(backend, dims, frozen):
    """Only the gradients asked for are computed, and those are the same."""
    naive, efficient = block_pair(dims, True, "bottleneck", "train", dilations=(2, 2, 2))
    images = make_images(2, 7, *(9, 6, 5)[:dims])
    for block in (naive, efficient):
        for name, parameter in block.named_parameters():
            parameter.requires_grad_(frozen not in name or "denselayer2" in name)
    assert_close(block_step(efficient, images), block_step(naive, images))


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_one_convolution_alone_is_trained(backend, dims):
    """Nothing in front of it needs a gradient."""
    gradients = []
    for block in block_pair(dims, True, "bottleneck", "train", dilations=(2, 2, 2)):
        block.requires_grad_(False)
        weight = block.denselayer1.conv2.weight.requires_grad_()
        loss_of(block(make_images(2, 7, *(9, 6, 5)[:dims]))).backward()
        gradients.append({"": weight.grad})
    assert_close(*reversed(gradients))


@other_dims
def test_gradients_numerically(backend, dims):
    block = DenseBlock(2, 3, 2, 2, spatial_dims=dims, dilation=2).double()
    transition = Transition(7, 3, dims).double()
    images = make_images(2, 3, *(4, 3, 2)[:dims]).requires_grad_()
    assert torch.autograd.gradcheck(block, (images,))
    assert torch.autograd.gradcheck(lambda x: transition(block(x)), (images.detach()[:, :, :4].requires_grad_(),))


def test_compiles_to_a_full_graph(native_backend):
    naive, efficient = make_pair(spatial_dims=3, block_config=(2,))
    compiled = torch.compile(efficient, fullgraph=True, backend="aot_eager")
    images = make_images(2, 3, *SIZES[3])
    results = [step(model, images) for model in (compiled, naive)]
    assert_close(*({name: result[name] for name in ("logits", "images.grad")} for result in results))


# Bad input: an error of the type that PyTorch raises for the naive model, in one line

SMALL_STEM = {"small_inputs": True}
BAD_IMAGES = {
    "1D: no batch": (1, {}, (3, 70), r"expected 3D input \[N, 3, L\] \(got 2D input of size \(3, 70\)\)"),
    "1D: an image": (1, {}, (2, 3, 33, 47), r"expected 3D input \[N, 3, L\] \(got 4D"),
    "1D: four channels": (1, {}, (2, 4, 70), r"3 channels.*4"),
    "1D: too short to pool": (1, {}, (2, 3, 4), r"too small"),
    "1D: nothing": (1, {}, (2, 3, 0), r"small|0"),
    "1D: one value per channel": (1, {"block_config": (3,)}, (1, 3, 1), r"more than 1 value per channel"),
    "1D: too short to pool, small": (1, SMALL_STEM, (2, 3, 1), r"\(18x1\).*\(18x0\).*too small"),
    "3D: no batch": (3, {}, (3, 18, 21, 19), r"expected 5D input \[N, 3, D, H, W\] \(got 4D"),
    "3D: an image": (3, {}, (2, 3, 33), r"expected 5D input \[N, 3, D, H, W\] \(got 3D"),
    "3D: too many axes": (3, {}, (2, 3, 1, 18, 21, 19), r"expected 5D input.*got 6D"),
    "3D: one channel": (3, {}, (2, 1, 18, 21, 19), r"3 channels.*1"),
    "3D: too flat to pool": (3, {}, (2, 3, 4, 33, 33), r"too small"),
    "3D: too flat to pool, small": (3, SMALL_STEM, (2, 3, 1, 9, 9), r"\(18x1x9x9\).*\(18x0x4x4\).*too small"),
    "3D: one value per channel": (3, {"block_config": (3,)}, (1, 3, 2, 2, 2), r"more than 1 value per channel"),
}


@every_level
@pytest.mark.parametrize(("dims", "arguments", "shape", "message"), BAD_IMAGES.values(), ids=BAD_IMAGES)
def test_errors_are_of_pytorchs_type(backend, dims, arguments, shape, message, level):
    naive, efficient = make_pair(dtype=torch.float32, spatial_dims=dims, checkpointing=level, **arguments)
    expected, error = error_of(naive, torch.zeros(shape)), error_of(efficient, torch.zeros(shape))
    assert isinstance(expected, type(error)), (error, expected)
    assert_one_line(error, message)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_a_block_alone_checks_its_input(backend, dims):
    naive, efficient = block_pair(dims, True, "bottleneck", "train", dilations=(2, 2))
    size = (9, 6, 5)[:dims]
    for shape in [(2, 7, *size, 4), (2, 6, *size), (1, 7, *[1] * dims)]:
        expected, error = (error_of(block, make_images(*shape)) for block in (naive, efficient))
        assert isinstance(expected, type(error)), (error, expected)
        assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: EfficientDenseNet(spatial_dims=4), ValueError, "spatial_dims must be 1, 2 or 3, got 4"),
        (lambda: EfficientDenseNet(spatial_dims="3D"), ValueError, "spatial_dims must be 1, 2 or 3, got '3D'"),
        (lambda: EfficientDenseNet121(weights="IMAGENET1K_V1", spatial_dims=3), ValueError, "images alone.*is 3"),
        (lambda: DenseBlock(2, 8, spatial_dims=0), ValueError, "spatial_dims must be 1, 2 or 3, got 0"),
        (lambda: DenseBlock(0, 8), ValueError, "num_layers must be at least 1, got 0"),
        (lambda: DenseBlock(2, 8, kernel_size=4), ValueError, "kernel_size must be odd.*got 4"),
        (lambda: DenseBlock(2, 8, kernel_size=(3, 3)), TypeError, r"kernel_size must be an int, got \(3, 3\)"),
        (lambda: DenseBlock(2, 8, dilation=0), ValueError, "dilation must be at least 1, got 0"),
        (lambda: DenseBlock(2, 8, dilation=(1, 2, 4)), ValueError, r"one per layer, 2, got 3: \(1, 2, 4\)"),
        (lambda: DenseBlock(2, 8, dilation=(1, "2")), TypeError, "dilation must be an int, got '2'"),
        (lambda: DenseBlock(2, 8, drop_rate=1.0), ValueError, r"drop_rate must be in \[0, 1\), got 1.0"),
        (lambda: DenseBlock(2, 8, checkpointing="all"), ValueError, "checkpointing must be one of .* got 'all'"),
        (lambda: DenseLayer(8, growth_rate=-1), ValueError, "growth_rate must be at least 1, got -1"),
        (lambda: DenseLayer(8, 4, bn_size=2.5), TypeError, "bn_size must be an int, got 2.5"),
        (lambda: Transition(8, 0), ValueError, "num_output_features must be at least 1, got 0"),
        (lambda: Transition(8, 4, spatial_dims=5), ValueError, "spatial_dims must be 1, 2 or 3, got 5"),
    ],
)
def test_bad_arguments(make, error, message):
    with pytest.raises(error, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_norms_of_other_dimensions_run_layer_by_layer_and_raise_pytorchs_error():
    _, efficient = make_pair(spatial_dims=3)
    efficient.features.denseblock1.denselayer2.norm2 = torch.nn.BatchNorm2d(12).double()
    with pytest.warns(UserWarning, match=r"denselayer2 has norms and convolutions of different spatial dimensions"):
        error = error_of(efficient, make_images(2, 3, *SIZES[3]))
    assert "expected 4D input" in str(error)


@pytest.mark.parametrize("path", ["norm5", "transition1.norm"])
def test_a_consumer_of_other_dimensions_raises_pytorchs_error(path):
    """As the last norm of 3D-ResNets' first version, a BatchNorm2d, which PyTorch once let pass."""
    pair = make_pair(spatial_dims=3)
    for model in pair:
        parent, _, name = path.rpartition(".")
        norm = model.features.get_submodule(path)
        setattr(model.features.get_submodule(parent), name, torch.nn.BatchNorm2d(norm.num_features).double())
    errors = [str(error_of(model, make_images(2, 3, *SIZES[3]))) for model in pair]
    assert errors[0] == errors[1] == "expected 4D input (got 5D input)"


def test_a_convolution_that_changes_the_size_runs_layer_by_layer():
    block = DenseBlock(2, 8, growth_rate=4, dilation=2)
    block.denselayer2.conv2.padding = (1, 1)
    with pytest.warns(UserWarning, match=r"denselayer2.conv2 is .* of another geometry"):
        error = error_of(block, torch.zeros(2, 8, 6, 6))
    assert "Sizes of tensors must match" in str(error)
