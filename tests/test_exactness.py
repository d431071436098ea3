"""Whole models against the naive one: outputs, every gradient and every buffer, in every variant, level and mode.

In float64 each tensor is held to 1e-9 of its norm. In float32 and below one flipped ReLU outweighs all rounding, in any
implementation; so there the median error over several seeds is held to twice the naive model's, plus a floor.
"""

import copy
import functools
import statistics

import pytest
import torch
from cases import (
    CPU_BACKENDS,
    GPU_BACKENDS,
    LEVELS,
    MODES,
    VARIANTS,
    assert_close,
    global_average,
    group_errors,
    loss_of,
    make_images,
    make_pair,
    norms_of,
    randomise,
    set_mode,
    step,
    use_backend,
)
from torch import nn

from densenet_efficient import dense_layers, kernels
from densenet_efficient.modules import DenseBlock
from densenet_efficient.reference import NaiveDenseBlock
from densenet_efficient.segmentation import FCDenseNet

pytestmark = pytest.mark.usefixtures("one_thread", "nan_memory")

every_level = pytest.mark.parametrize("level", LEVELS)
every_variant = pytest.mark.parametrize("variant", VARIANTS)


@pytest.fixture(params=[*CPU_BACKENDS, *GPU_BACKENDS])
def backend(request, monkeypatch):
    yield from use_backend(request.param, monkeypatch)


def assert_same_steps(pair, images, steps=1, seed=None):
    """The same results of ``steps`` forwards and backwards, whose gradients add up."""
    naive, efficient = pair
    for _ in range(steps):
        expected = step(naive, images, seed)
        assert_close(step(efficient, images, seed), expected)


@pytest.mark.parametrize("drop_rate", [0.0, 0.5])
@pytest.mark.parametrize("images", [1, 2, 3, 5, 9])
def test_bottlenecks_recomputed_as_on_a_gpu(images, drop_rate, monkeypatch):
    """In up to four parts of the images, and their gradients with them."""
    monkeypatch.setenv(kernels.BACKEND_VARIABLE, "reference")
    monkeypatch.setattr(dense_layers, "recomputes_gradients", lambda device: True)
    pair = make_pair(checkpointing="bottleneck", drop_rate=drop_rate)
    assert_same_steps(pair, make_images(images, 3, 33, 47), steps=2, seed=1)


@pytest.mark.parametrize("drop_rate", [0.0, 0.5])
@pytest.mark.parametrize("images", [1, 2, 3, 5, 9])
def test_bottlenecks_recomputed_where_gradients_are_done_with(backend, images, drop_rate):
    """Those of the first two layers; the others' in up to four parts of the images."""
    pair = make_pair(checkpointing="bottleneck", drop_rate=drop_rate, num_init_features=4, block_config=(5,))
    assert_same_steps(pair, make_images(images, 3, 33, 47), steps=2, seed=1)


@every_level
@every_variant
@pytest.mark.parametrize("mode", [*MODES, "mixed"])
@pytest.mark.parametrize("small_inputs", [True, False])
def test_float64(backend, variant, level, mode, small_inputs):
    pair = make_pair(mode=mode, checkpointing=level, small_inputs=small_inputs, **VARIANTS[variant])
    size = (9, 7) if small_inputs else (33, 47)
    assert_same_steps(pair, make_images(3, 3, *size), steps=2)


@every_level
@pytest.mark.parametrize(
    "arguments",
    [
        {"block_config": (1,), "small_inputs": True},
        {"block_config": (2, 1, 3, 1), "num_init_features": 5},
        {"growth_rate": 1, "bn_size": 1, "num_init_features": 1, "in_channels": 1},
        {"growth_rate": 13, "bn_size": 2, "num_init_features": 17, "compression": 0.37},
        {"block_config": (12, 6), "growth_rate": 3, "num_init_features": 33},
    ],
    ids=str,
)
def test_other_topologies(backend, level, arguments):
    pair = make_pair(checkpointing=level, **arguments)
    assert_same_steps(pair, make_images(2, arguments.get("in_channels", 3), 64, 40))


SHAPES = [(1, 33, 47), (2, 47, 33), (5, 16, 64), (1, 100, 20), (3, 15, 15)]


@every_level
@every_variant
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_odd_sizes(backend, variant, level, shape):
    pair = make_pair(checkpointing=level, **VARIANTS[variant])
    images, *size = shape
    assert_same_steps(pair, make_images(images, 3, *size))


@every_level
def test_one_pixel_in_evaluation(backend, level):
    pair = make_pair(mode="eval", checkpointing=level, block_config=(3,), small_inputs=True)
    assert_same_steps(pair, make_images(1, 3, 1, 1))


LAYOUTS = {
    "contiguous": lambda: make_images(2, 3, 18, 14),
    "channels_last": lambda: make_images(2, 3, 18, 14).contiguous(memory_format=torch.channels_last),
    "sliced": lambda: make_images(4, 5, 30, 40)[1:3, 1:4, 3:21, 5:33:2],
    "transposed": lambda: make_images(2, 3, 14, 18).transpose(2, 3),
    "expanded": lambda: make_images(1, 1, 18, 14).expand(2, 3, 18, 14),
    "flipped": lambda: make_images(3, 2, 18, 14).transpose(0, 1),
}


@every_level
@pytest.mark.parametrize("small_inputs", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(backend, level, layout, small_inputs):
    pair = make_pair(checkpointing=level, small_inputs=small_inputs)
    assert_same_steps(pair, LAYOUTS[layout]())


WEIGHT_LAYOUTS = {
    "of Keras": lambda weight: weight.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1),
    "slices": lambda weight: torch.cat([weight, weight], 1)[:, : weight.shape[1]],
    "expanded": lambda weight: weight[:1].clone().expand_as(weight),
}


@every_level
@pytest.mark.parametrize("bottleneck", [True, False])
@pytest.mark.parametrize("layout", WEIGHT_LAYOUTS)
def test_layouts_of_weights(backend, level, bottleneck, layout):
    pair = make_pair(checkpointing=level, bottleneck=bottleneck)
    for model in pair:
        for conv in model.modules():
            if isinstance(conv, nn.Conv2d):
                conv.weight = nn.Parameter(WEIGHT_LAYOUTS[layout](conv.weight.detach()))
                assert not conv.weight.is_contiguous() or 1 in conv.weight.shape
    assert_same_steps(pair, make_images(2, 3, 33, 47))


@every_level
@pytest.mark.parametrize("small_inputs", [True, False])
def test_channels_last_models(backend, level, small_inputs):
    pair = make_pair(checkpointing=level, small_inputs=small_inputs)
    images = make_images(2, 3, 18, 14).contiguous(memory_format=torch.channels_last)
    assert_same_steps([model.to(memory_format=torch.channels_last) for model in pair], images)


@pytest.mark.parametrize(
    ("make", "transition", "strides"),
    [
        (lambda: make_pair()[1], "features.transition1", (18, 1, 18, 18)),
        (lambda: FCDenseNet(3, (2, 2), 6).double(), "transitions_down.0", (12, 1, 12, 12)),
    ],
    ids=["EfficientDenseNet", "FCDenseNet"],
)
def test_gradients_of_a_channels_last_model_are_laid_out_as_its_parameters(backend, make, transition, strides):
    """To the strides of axes of one, which DistributedDataParallel compares and warns of."""
    model = make().to(memory_format=torch.channels_last)
    loss_of(model(make_images(2, 3, 18, 14))).backward()
    assert model.get_parameter(f"{transition}.conv.weight").grad.stride() == strides
    for name, parameter in model.named_parameters():
        assert parameter.grad.stride() == parameter.stride(), name


@every_level
@every_variant
def test_means_far_from_zero(backend, variant, level):
    pair = make_pair(checkpointing=level, small_inputs=True, **VARIANTS[variant])
    assert_same_steps(pair, make_images(3, 3, 12, 10, mean=1e3))


@every_level
@every_variant
@pytest.mark.parametrize("mode", MODES)
def test_without_running_statistics(backend, variant, level, mode):
    pair = make_pair(checkpointing=level, **VARIANTS[variant])
    for model in pair:
        for norm in norms_of(model)[::2]:
            norm.track_running_stats = False
            norm.running_mean = norm.running_var = norm.num_batches_tracked = None
        set_mode(model, mode)
    assert_same_steps(pair, make_images(3, 3, 33, 47))


@every_level
def test_tracking_switched_off_with_statistics_at_hand(backend, level):
    """torch.nn.BatchNorm2d then uses its running statistics in evaluation, and leaves them alone in training."""
    pair = make_pair(checkpointing=level)
    for model in pair:
        for norm in norms_of(model):
            norm.track_running_stats = False
    assert_same_steps(pair, make_images(3, 3, 33, 47))
    assert_same_steps([set_mode(model, "eval") for model in pair], make_images(3, 3, 33, 47))


@every_level
def test_momentum(backend, level):
    """None is the cumulative average; any norm may have its own."""
    pair = make_pair(checkpointing=level)
    for model in pair:
        model.apply(lambda module: module.reset_running_stats() if isinstance(module, nn.BatchNorm2d) else None)
        for index, norm in enumerate(norms_of(model)):
            norm.momentum = (None, 0.3, 0.0, 1.0)[index % 4]
            norm.eps = (1e-5, 1e-3)[index % 2]
    for seed in range(3):
        assert_same_steps(pair, make_images(3, 3, 33, 47, seed=seed))
    assert all(norm.num_batches_tracked == 3 for norm in norms_of(pair[1]))


@every_level
@pytest.mark.parametrize("mode", ["train", "eval"])
@every_variant
def test_dropout(backend, variant, level, mode):
    """The same seed drops the same features as the naive model, from contiguous images."""
    pair = make_pair(mode=mode, checkpointing=level, drop_rate=0.3, small_inputs=True, **VARIANTS[variant])
    assert_same_steps(pair, make_images(3, 3, 9, 7), steps=2, seed=5)


def test_dropout_drops(backend):
    _, efficient = make_pair(drop_rate=0.3)
    images = make_images(2, 3, 33, 47)
    assert not torch.equal(efficient(images), efficient(images))


@every_level
def test_inference_keeps_nothing(backend, level):
    """Under no_grad the results are those of the training forward, and no graph hangs on them."""
    naive, efficient = make_pair(checkpointing=level)
    images = make_images(3, 3, 33, 47)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            logits = efficient(images)
            assert_close({"logits": logits}, {"logits": naive(images)})
        assert not logits.requires_grad
    assert_close(dict(efficient.named_buffers()), dict(naive.named_buffers()))


@every_level
def test_levels_may_change_between_steps(backend, level):
    pair = make_pair(checkpointing=level)
    assert_same_steps(pair, make_images(3, 3, 33, 47))
    pair[1].checkpointing = next(other for other in LEVELS if other != level)
    assert_same_steps(pair, make_images(3, 3, 33, 47))


@every_level
def test_level_may_change_between_forward_and_backward(backend, level):
    naive, efficient = make_pair(checkpointing=level)
    images = make_images(3, 3, 33, 47)
    expected = step(naive, images)
    leaf = images.clone().requires_grad_()
    logits = efficient(leaf)
    efficient.checkpointing = next(other for other in LEVELS if other != level)
    loss_of(logits).backward()
    assert_close({"images.grad": leaf.grad}, {"images.grad": expected["images.grad"]})


@every_level
def test_a_graph_kept_for_a_second_backward(backend, level):
    naive, efficient = make_pair(checkpointing=level)
    images = make_images(3, 3, 33, 47)
    gradients = []
    for model in (naive, efficient):
        loss = loss_of(model(images))
        loss.backward(retain_graph=True)
        loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert_close(gradients[1], gradients[0])


@every_level
def test_two_forwards_before_a_backward(backend, level):
    """Two images sets through the same weights, as a siamese network has them."""
    naive, efficient = make_pair(checkpointing=level)
    first, second = make_images(3, 3, 33, 47), make_images(2, 3, 20, 18, seed=1)
    gradients = []
    for model in (naive, efficient):
        (loss_of(model(first)) * loss_of(model(second))).backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert_close(gradients[1], gradients[0])


def block_step(block, images):
    images = images.clone().requires_grad_()
    features = block(images)
    loss_of(features).backward()
    gradients = {name: parameter.grad for name, parameter in block.named_parameters()}
    return {"features": features, "images.grad": images.grad, **gradients, **dict(block.named_buffers())}


@every_level
@pytest.mark.parametrize("bottleneck", [True, False])
@pytest.mark.parametrize("mode", [*MODES, "mixed"])
def test_a_block_alone(backend, level, bottleneck, mode):
    arguments = (4, 7, 5, 3, 0.0, bottleneck) if backend == "reference" else (4, 33, 4, 12, 0.0, bottleneck)
    layers, channels, bn_size, growth_rate, drop_rate, _ = arguments
    naive = NaiveDenseBlock(layers, channels, growth_rate, bn_size, drop_rate, bottleneck).double()
    efficient = DenseBlock(layers, channels, bn_size, growth_rate, drop_rate, bottleneck, level).double()
    randomise(naive)
    efficient.load_state_dict(naive.state_dict())
    set_mode(naive, mode)
    set_mode(efficient, mode)
    images = make_images(2, channels, 7, 5)
    assert_close(block_step(efficient, images), block_step(naive, images))
    assert_close({"": efficient.forward_by_layers(images)}, {"": naive(images)})


def test_features_and_logits_of_one_forward(backend):
    """A block's features are an output too: their gradient joins that of its exit."""
    results = []
    for model in make_pair():
        images = make_images(2, 3, 33, 47).requires_grad_()
        stem = model.features[:4] if hasattr(model.features, "norm0") else model.features[:1]
        block = model.features.denseblock1(stem(images))
        out = model.features.denseblock2(model.features.transition1(block))
        logits = model.classifier(global_average(model.features.norm5(out)))
        (loss_of(block) + loss_of(out) + loss_of(logits)).backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        results.append({"block": block, "out": out, "images": images.grad, **gradients})
    assert_close(results[1], results[0])


@pytest.mark.parametrize("stop", [1, 4, 5, 6, 8, None])
def test_gradients_without_memory_of_their_own(backend, stop):
    """The gradient of a sum is one number expanded, with strides of zero."""
    results = []
    for model in make_pair():
        images = make_images(2, 3, 33, 47).requires_grad_()
        if stop is None:
            model.classifier = nn.Identity()
        outputs = (model if stop is None else model.features[:stop])(images)
        outputs.sum().backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        results.append({"outputs": outputs, "images": images.grad, **gradients})
    assert_close(results[1], results[0])


# Medians over these seeds are compared; the floors are what the median itself varies by.
SEEDS = range(5)
LOW_PRECISION = {
    "float32": (torch.float32, False, 1e-5),
    "autocast": (torch.float32, True, 2e-2),
    "bfloat16": (torch.bfloat16, False, 2e-2),
    "float16": (torch.float16, False, 2e-2),
}


def low_precision_step(model, images, dtype, autocast):
    model = copy.deepcopy(model).to(dtype)
    leaf = images.to(dtype, copy=True).requires_grad_()
    with torch.autocast(images.device.type, torch.bfloat16, enabled=autocast):
        logits = model(leaf)
    loss_of(logits).backward()
    gradients = {f"{name}.grad": parameter.grad for name, parameter in model.named_parameters()}
    return {"logits": logits, "images.grad": leaf.grad, **gradients, **dict(model.named_buffers())}


def assert_errors_at_most_twice(errors, floor):
    """``errors``: per seed those of the (naive, efficient) model, by group of results."""
    for group in errors[0][0]:
        naive, efficient = (statistics.median(pair[index][group] for pair in errors) for index in (0, 1))
        assert efficient <= 2 * naive + floor, (group, efficient, naive)


@every_level
@every_variant
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("precision", ["float32", "autocast", "bfloat16"])
def test_low_precision(backend, variant, level, mode, precision):
    assert_low_precision(variant, level, mode, precision)


@every_level
@pytest.mark.parametrize("variant", ["bc", "plain"])
def test_float16(backend, variant, level):
    assert_low_precision(variant, level, "train", "float16")


def assert_low_precision(variant, level, mode, precision):
    dtype, autocast, floor = LOW_PRECISION[precision]
    errors = []
    for seed in SEEDS:
        truth, naive_errors = truth_and_naive_errors(seed, variant, mode, precision, torch.get_default_device())
        _, model = make_pair(seed, torch.float32, mode, checkpointing=level, **VARIANTS[variant])
        found = low_precision_step(model, low_precision_images(seed), dtype, autocast)
        errors.append((naive_errors, group_errors(found, truth)))
    assert_errors_at_most_twice(errors, floor)


@functools.cache  # torch's bfloat16 convolutions take seconds where the CPU has none
def truth_and_naive_errors(seed, variant, mode, precision, device):
    """A step of the naive model in float64, and its errors in this precision; no level and no backend changes them."""
    dtype, autocast, _ = LOW_PRECISION[precision]
    naive, _ = make_pair(seed, torch.float32, mode, **VARIANTS[variant])
    images = low_precision_images(seed)
    truth = step(copy.deepcopy(naive).double(), images.double())
    return truth, group_errors(low_precision_step(naive, images, dtype, autocast), truth)


def low_precision_images(seed):
    return make_images(3, 3, 33, 47, seed=seed, dtype=torch.float32)


@every_level
def test_float32_with_means_far_from_zero(backend, level):
    errors = []
    for seed in SEEDS:
        pair = make_pair(seed, torch.float32, checkpointing=level, small_inputs=True)
        images = make_images(3, 3, 12, 10, seed=seed, dtype=torch.float32, mean=1e3)
        truth = step(copy.deepcopy(pair[0]).double(), images.double())
        errors.append([group_errors(low_precision_step(model, images, torch.float32, False), truth) for model in pair])
    assert_errors_at_most_twice(errors, 1e-5)


@every_level
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_bits_in_every_run_and_with_any_number_of_threads(native_backend, level, dtype):
    _, model = make_pair(dtype=dtype, checkpointing=level, growth_rate=12, num_init_features=24)
    images = make_images(4, 3, 65, 47, dtype=dtype)
    results = []
    for threads in (1, 1, 2, 2):
        torch.set_num_threads(threads)
        results.append(step(copy.deepcopy(model), images))
    for other in results[1:]:
        different = [name for name, value in results[0].items() if not torch.equal(other[name], value)]
        assert not different
