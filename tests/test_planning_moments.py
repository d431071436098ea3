"""The moments of a step, of an inference and of an optimizer, by buffers whose sizes tell them apart."""

from dataclasses import replace

import pytest
import torch

from densenet_efficient import EfficientDenseNet
from densenet_efficient.planning import timeline
from densenet_efficient.planning.shapes import BlockShape, NetworkShape, Parameters, StemShape, shape_of
from densenet_efficient.planning.timeline import OPTIMIZERS, Memory, TrainingStep, inference_peak

STEM = StemShape(
    Parameters(11, 10, 9, 8), images=1000, cast=500, conv_out=300, out=200, forward_workspace=250,
    backward_workspace=350, recomputed=1000,
)  # fmt: skip
FIRST = BlockShape(
    "denseblock1", Parameters(21, 20, 19, 18), input=10, storage=40, bottleneck=20, layers=2, bottleneck_part=5,
    gradient_part=6, masks=3, dropped=2, pooled=8, out=4, recomputed=(100, 150),
)  # fmt: skip
SECOND = BlockShape(
    "denseblock2", Parameters(31, 30, 29, 28), input=4, storage=16, bottleneck=12, layers=3, bottleneck_part=4,
    gradient_part=3, masks=0, dropped=0, pooled=30, out=1, recomputed=(7, 8, 9),
)  # fmt: skip
SHAPE = NetworkShape(8, STEM, [FIRST, SECOND], Parameters(41, 40, 39, 38))


def test_layers_without_bottlenecks_keep_none():
    model = EfficientDenseNet(8, (2, 2), 16, bottleneck=False)
    assert [block.bottleneck for block in shape_of(model, (2, 3, 32, 32), torch.float32, "cpu").blocks] == [0, 0]


def test_the_one_convolution_of_a_small_stem_is_not_recomputed():
    model = EfficientDenseNet(8, (2, 2), 16, small_inputs=True)
    stem = shape_of(model, (2, 3, 32, 32), torch.float32, "cpu").stem
    assert (stem.conv_out, stem.recomputed) == (0, 0)


def test_no_more_images_are_convolved_at_a_time_than_there_are():
    stem = shape_of(EfficientDenseNet(8, (2, 2), 16), (1, 3, 64, 64), torch.float32, "cpu").stem
    assert stem.conv_out == 16 * 32 * 32 * 4
    assert (stem.forward_workspace, stem.backward_workspace) == (stem.conv_out, 2 * stem.conv_out)


def training(level, saved, shape=SHAPE, device="cpu"):
    return TrainingStep(shape, [level] * 2, OPTIMIZERS["adamw"], device, (), saved)


def moments_of(step):
    return [(one.stage, one.action, one.gradients, one.saved, one.workspace) for one in step.moments()]


def test_the_moments_where_a_bottleneck_is_free():
    step = training("bottleneck", [0, 1])
    assert moments_of(step) == [
        ("stem", "forward", 0, 1500, 300 + 250),
        ("denseblock1", "forward", 0, 1500 + 40 + 3, 10 + 20 + 8 + 4),
        ("denseblock2", "forward", 0, 1543 + 16 + 12, 4 + 30 + 1),
        ("denseblock2", "backward", 40 + 30, 1571, 1 + 16 + 30),
        ("denseblock1", "backward", 70 + 20, 1543, 4 + 40 + (5 + 6 + 2)),
        ("stem", "backward", 90 + 10, 1500, 200 + 300 + 350),
        ("optimizer", "step", 100, 1500, 2 * 38),
    ]
    assert step.recomputed == 100 + 150 + 7 + 8 + 1000
    assert step.activation_peak == 1500 + 850


def test_the_moments_where_all_is_saved():
    step = training("none", [2, 3])
    assert moments_of(step) == [
        ("stem", "forward", 0, 1500, 300 + 250),
        ("denseblock1", "forward", 0, 1800 + 40 + 3 + 2 * 20, 10 + 8 + 4),
        ("denseblock2", "forward", 0, 1883 + 16 + 3 * 12, 4 + 30 + 1),
        ("denseblock2", "backward", 40 + 30, 1935, 1 + 16 + 30),
        ("denseblock1", "backward", 70 + 20, 1883, 4 + 40 + (20 + 2)),
        ("stem", "backward", 90 + 10, 1800, 200 + 300 + 350),
        ("optimizer", "step", 100, 1500, 2 * 38),
    ]
    assert step.recomputed == 0


def test_the_largest_part_of_a_backward_is_what_it_takes():
    """The gradient of a block's input; the stem's convolution with its gradient, or with torch's workspace for it."""
    for shape, place, workspace in (
        (replace(SHAPE, blocks=[replace(FIRST, input=99), SECOND]), 4, 4 + 40 + 99),
        (replace(SHAPE, stem=replace(STEM, backward_workspace=0)), 5, 200 + 300 + 300),
        (replace(SHAPE, stem=replace(STEM, forward_workspace=400)), 5, 200 + 300 + 400),
        (replace(SHAPE, blocks=[FIRST, replace(SECOND, pooled=0)]), 3, 1 + 16 + 12 + 4),
    ):
        assert moments_of(training("bottleneck", [0, 1], shape))[place][4] == workspace


def test_what_the_stages_own():
    stages = training("none", [2, 3]).stages()
    assert [(stage.name, stage.checkpointing) for stage in stages] == [
        ("stem", "none"), ("denseblock1", "none"), ("denseblock2", "none"), ("head", None),
    ]  # fmt: skip
    assert [stage.own for stage in stages] == [
        Memory(11, 10, 2 * 10, 1500 + 300, 850),
        Memory(21, 20, 2 * 20, 40 + 3 + 40, 66),
        Memory(31, 30, 2 * 30, 16 + 36, 47),
        Memory(41, 40, 2 * 40, 0, 0),
    ]
    away = TrainingStep(SHAPE, ["none"] * 2, OPTIMIZERS["adamw"], "cuda", (True, False), [2, 3])
    assert [stage.own.saved_activations for stage in away.stages()] == [1800, 3 + 40, 52, 0] and away.on_host == 40
    always = 104 + 200  # weights and states
    last = always + 70 + 1935 + 47
    assert [stage.peak for stage in stages] == [always + 100 + 1800 + 850, always + 90 + 1883 + 66, last, last]


def test_on_a_gpu_an_optimizer_has_one_copy_of_all_gradients_besides():
    assert moments_of(training("none", [2, 3], device="cuda"))[-1] == ("optimizer", "step", 100, 1500, 100)


@pytest.mark.parametrize(
    ("name", "kind", "options"),
    [
        ("sgd", torch.optim.SGD, {}),
        ("sgd-momentum", torch.optim.SGD, {"momentum": 0.9}),
        ("rmsprop", torch.optim.RMSprop, {}),
        ("adam", torch.optim.Adam, {}),
        ("adamw", torch.optim.AdamW, {}),
    ],
)
def test_an_optimizer_keeps_as_many_copies_as_torchs(name, kind, options):
    parameter = torch.nn.Parameter(torch.zeros(10))
    parameter.grad = torch.ones(10)
    optimizer = kind([parameter], lr=0.1, **options)
    optimizer.step()
    state = [value for value in optimizer.state[parameter].values() if value is not None]
    assert OPTIMIZERS[name].copies == sum(value.dim() == 1 for value in state)


@pytest.mark.parametrize(
    ("native", "weights", "stem"), [(False, 104, 500 + 300 + 250), (True, 104 + 96, 500 + 200)], ids=["torch", "native"]
)
def test_an_inference_of_a_large_stem(native, weights, stem, monkeypatch):
    monkeypatch.setattr(timeline.cpu, "is_available", lambda: native)
    peak = inference_peak(SHAPE, "cpu")
    assert (peak.moment, peak.memory) == ("stem, forward", Memory(weights, 0, 0, 1000, stem))
    assert inference_peak(SHAPE, "cuda").memory == Memory(104, 0, 0, 1000, 1050)


@pytest.mark.parametrize(("threads", "images"), [(2, 2 * 4), (3, 3 * 2), (8, 8), (16, 1)])
def test_threads_of_a_native_inference_hold_a_few_images_each(threads, images, monkeypatch):
    """Up to a mebibyte of them; where there are fewer images than threads, all work on one."""
    monkeypatch.setattr(timeline.cpu, "is_available", lambda: True)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    large = replace(FIRST, storage=8 * 2**17, bottleneck=8 * 2**17, pooled=8 * 2**10)
    peak = inference_peak(replace(SHAPE, blocks=[large, SECOND]), "cpu")
    assert peak.moment == "denseblock1, forward"
    assert peak.memory.workspace == 10 + images * (2**18 + 2**10) + 4
    assert (
        inference_peak(replace(SHAPE, blocks=[large, SECOND]), "cuda").memory.workspace == 10 + 8 * (2**18 + 2**10) + 4
    )
