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
    make_images,
    make_pair,
    randomise,
    set_mode,
    step,
    trained,
    use_backend,
)
from test_exactness import assert_errors_at_most_twice, assert_same_steps, block_step, low_precision_step

from densenet_efficient import DenseBlock, Transition
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


@other_dims
def test_other_layouts(backend, dims):
    pair = make_pair(spatial_dims=dims)
    size = SIZES[dims]
    assert_same_steps(pair, make_images(2, *size, 3).movedim(-1, 1))
    assert_same_steps(pair, make_images(2, 3, *(2 * length for length in size))[(..., *[slice(None, None, 2)] * dims)])


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
@pytest.mark.parametrize("mode", ["train", "frozen"])
@pytest.mark.parametrize(("kernel_size", "dilations"), KERNELS, ids=str)
def test_kernel_sizes_and_dilations(backend, dims, bottleneck, level, mode, kernel_size, dilations):
    naive, efficient = block_pair(dims, bottleneck, level, mode, kernel_size, dilations)
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
