"""The native loop over a dense block's layers: the bits of Python's loop, and the stages that it serves."""

import copy

import pytest
import torch
from cases import LEVELS, assert_close, make_images, make_pair, needs_native, state_of, step

from densenet_efficient import DenseBlock, native_layers

pytestmark = [needs_native, pytest.mark.usefixtures("native_backend")]

IMAGES = (2, 3, 40, 56)


@pytest.fixture
def loops(monkeypatch):
    """What the predicate answered, in order."""
    answers = []
    can_run = native_layers.can_run
    monkeypatch.setattr(native_layers, "can_run", lambda *stage: answers.append(can_run(*stage)) or answers[-1])
    return answers


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def assert_equal_bits(model, run, loops, monkeypatch):
    """``run`` of a copy of ``model`` gives the same by either loop."""
    native = run(copy.deepcopy(model))
    assert loops and all(loops)
    monkeypatch.setattr(native_layers, "can_run", lambda *_: False)
    assert_close(native, run(copy.deepcopy(model)), tolerance=0)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("bottleneck", [True, False])
@pytest.mark.parametrize("mode", ["train", "mixed", "frozen"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_step_has_the_bits_of_the_loop_in_python(threads, level, bottleneck, mode, dtype, loops, monkeypatch):
    _, model = make_pair(dtype=dtype, mode=mode, bottleneck=bottleneck, checkpointing=level)
    images = make_images(*IMAGES, dtype=dtype)
    assert_equal_bits(model, lambda copied: step(copied, images), loops, monkeypatch)


@pytest.mark.parametrize("images", [1, 2, 5])
def test_bottlenecks_recomputed_where_gradients_are_done_with(images, loops, monkeypatch):
    _, model = make_pair(checkpointing="bottleneck", num_init_features=4, block_config=(5,))
    assert_equal_bits(model, lambda copied: step(copied, make_images(images, 3, 33, 47)), loops, monkeypatch)


@pytest.mark.parametrize("level", LEVELS)
def test_a_step_under_autocast(level, loops, monkeypatch):
    _, model = make_pair(dtype=torch.float32, checkpointing=level)

    def run(copied):
        with torch.autocast("cpu", torch.bfloat16):
            return step(copied.to(memory_format=torch.channels_last), make_images(*IMAGES, dtype=torch.float32))

    assert_equal_bits(model, run, loops, monkeypatch)


TRAINED = {
    "nothing below the second layer": lambda name: "denseblock1.denselayer1" not in name and "conv0" not in name,
    "one convolution": lambda name: name.endswith("denseblock2.denselayer1.conv2.weight"),
    "norms": lambda name: "norm" in name and name.endswith("weight"),
    "convolutions": lambda name: "conv1" in name,
}


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("bottleneck", [True, False])
@pytest.mark.parametrize("trained", TRAINED.values(), ids=TRAINED)
def test_only_what_is_needed(level, bottleneck, trained, loops, monkeypatch):
    _, model = make_pair(dtype=torch.float32, bottleneck=bottleneck, checkpointing=level)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained(name) or name.startswith("classifier"))

    def run(copied):
        copied(make_images(*IMAGES, dtype=torch.float32)).square().sum().backward()
        return state_of(copied)

    assert_equal_bits(model, run, loops, monkeypatch)


@pytest.mark.parametrize(
    "arguments",
    [{"drop_rate": 0.2}, {"kernel_size": 5}, {"dilation": 2}, {"spatial_dims": 3}, {"spatial_dims": 1}],
    ids=str,
)
def test_other_stages_run_in_python(arguments, loops):
    images = make_images(2, 6, *[8] * arguments.get("spatial_dims", 2), dtype=torch.float32)
    DenseBlock(2, 6, growth_rate=4, **arguments)(images).sum().backward()
    assert loops == [False, False]


def loop_arguments(dtype=torch.float32):
    """Of the forward and the backward, for two layers of 6 + 2 * 4 channels on 2 images of 5x3."""
    storage, bottlenecks = torch.rand(30, 14, dtype=dtype), [torch.rand(30, 8, dtype=dtype) for _ in range(2)]
    statistics, bottleneck_statistics = torch.rand(2, 14), torch.rand(2, 2, 8)
    weights, biases = ([torch.rand(channels) for channels in (6, 8, 10, 8)] for _ in range(2))
    running = [None, None, torch.rand(8), torch.rand(8), *[None] * 4]
    convolutions = [torch.randn(shape) for shape in [(8, 6, 1, 1), (4, 8, 3, 3), (8, 10, 1, 1), (4, 8, 3, 3)]]
    layers = (weights, biases, [1e-5] * 4, running, convolutions)
    forward = (storage, 5, 3, statistics, True, bottleneck_statistics, *layers, 2)
    backward = (
        torch.rand(30, 14, dtype=dtype), storage, 5, 3, statistics, bottleneck_statistics, bottlenecks, *layers,
        torch.zeros(14), torch.zeros(14), True, [True] * 12, True,
    )  # fmt: skip
    return {"dense_layers": forward, "dense_layers_backward": backward}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("operation", loop_arguments())
def test_schema_of_the_loops(operation, dtype):
    """They run inside `dense_stage`, so neither autograd nor a trace sees them."""
    operator = getattr(torch.ops.densenet_efficient, operation).default
    torch.library.opcheck(operator, loop_arguments(dtype)[operation], test_utils="test_schema")


@pytest.mark.parametrize(
    ("operation", "index", "value", "message"),
    [
        ("dense_layers", 6, [torch.rand(6)], "one or two entries per layer"),
        ("dense_layers", 7, [torch.rand(6)], "one or two entries per layer"),
        ("dense_layers", 8, [1e-5], "one or two entries per layer"),
        ("dense_layers", 9, [None], "one or two entries per layer"),
        ("dense_layers", 1, 7, "one row per pixel"),
        ("dense_layers", 1, 0, "one row per pixel"),
        ("dense_layers_backward", 2, 0, "one row per pixel"),
        ("dense_layers", 11, 3, "saved_bottlenecks must be between 0 and the 2 layers, got 3"),
        ("dense_layers", 11, -1, "saved_bottlenecks must be between 0 and the 2 layers, got -1"),
        ("dense_layers", 10, [torch.rand(8, 6, 1, 1)] * 4, "more channels than the 16"),
        ("dense_layers_backward", 6, [torch.rand(30, 8)] * 3, "bottlenecks must be at most one per layer, got 3 for 2"),
        ("dense_layers_backward", 15, [True], "needed must have 6 entries per layer"),
    ],
)
def test_impossible_arguments(operation, index, value, message):
    arguments = list(loop_arguments()[operation])
    arguments[index] = value
    with pytest.raises(RuntimeError, match=message):
        getattr(torch.ops.densenet_efficient, operation)(*arguments)


@pytest.mark.parametrize("bottleneck", [True, False])
def test_a_step_of_no_images(bottleneck, loops):
    block, images = DenseBlock(2, 6, growth_rate=4, bottleneck=bottleneck), torch.rand(0, 6, 8, 8, requires_grad=True)
    block(images).sum().backward()
    assert all(loops) and images.grad.shape == images.shape
    assert not any(parameter.grad.any() for parameter in block.parameters())
