"""The planner against what autograd allocates and what a process takes; the cheapest mix; levels per block."""

import itertools
import json

import pytest
import torch
from cases import LEVELS, SMALL, assert_close, make_images, make_pair, needs_native, step
from torch.profiler import ProfilerActivity, profile

import densenet_efficient
from densenet_efficient import EfficientDenseNet, plan
from densenet_efficient.cli import main
from densenet_efficient.measure import MIB, make_step, peak_memory_per_image
from densenet_efficient.models import create_model
from densenet_efficient.planning.free_bottlenecks import training_step, usual_shape
from densenet_efficient.planning.planner import Mix, cheapest_mix, mixes
from densenet_efficient.planning.shapes import Parameters, block_shape, blocks_of, shape_of, stored_dtype
from densenet_efficient.planning.sizes import format_bytes, format_count, parse_bytes
from densenet_efficient.planning.timeline import OPTIMIZERS
from densenet_efficient.reference import NaiveDenseNet

NETWORK = {"growth_rate": 8, "block_config": (2, 3, 3), "num_init_features": 16, "num_classes": 5}
SHAPE = (4, 3, 64, 64)
BATCH = 128  # so many that vectors are nothing beside maps
IMAGES = BATCH * 3 * 64 * 64 * 4  # bytes

pytestmark = pytest.mark.usefixtures("one_thread")


def allocated_peak(run):
    """The most bytes that torch's allocator gave out at one time during ``run``, beyond what lived before.

    Without oneDNN's own scratch in a product: 0.6 MiB was seen on a CPU with AMX, however few the images.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    events = sorted(profiled.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    products = [(event.start_ns(), event.duration_ns()) for event in events if event.name() == "aten::mm"]
    changes = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    live = peak = 0
    for (time, change), (_, following) in itertools.pairwise([*changes, (0, 0)]):
        live += change
        is_scratch = change == -following and any(0 <= time - start <= length for start, length in products)
        peak = peak if is_scratch else max(peak, live)
    return peak


@needs_native
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "levels", ["none", "bottleneck", ["bottleneck", "none", "none"], ["none", "bottleneck", "none"]]
)
@pytest.mark.parametrize("arguments", [{}, {"bottleneck": False}, {"drop_rate": 0.2}])
def test_a_training_step_allocates_what_is_predicted(arguments, levels, dtype):
    model = EfficientDenseNet(**NETWORK | arguments, checkpointing=levels)
    run = make_step(model, SHAPE[1:], BATCH, dtype=dtype)
    run()
    peak = plan(model, SHAPE[1:], dtype, batch=BATCH, optimizer="sgd").training
    # Weights and images lived before.
    assert peak.peak - peak.memory.weights == pytest.approx(allocated_peak(run) + IMAGES, rel=0.02)


@needs_native
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_inference_allocates_what_is_predicted(dtype):
    model = EfficientDenseNet(**NETWORK)
    run = make_step(model, SHAPE[1:], BATCH, dtype=dtype, task="infer")
    run()
    peak = plan(model, SHAPE[1:], dtype, batch=BATCH).inference
    assert peak.peak - peak.memory.weights == pytest.approx(allocated_peak(run) + IMAGES, rel=0.02)


@needs_native
@pytest.mark.parametrize(("name", "kind"), [("rmsprop", "RMSprop"), ("adam", "Adam"), ("adamw", "AdamW")])
def test_the_optimizer_keeps_what_is_predicted(name, kind):
    """Where activations are next to nothing, its step is the peak: gradients, state and its temporaries."""
    model = EfficientDenseNet(**NETWORK | {"num_classes": 40000})
    optimizer = getattr(torch.optim, kind)(model.parameters())
    images = torch.rand(2, 3, 32, 32)

    def run():
        model(images).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    run()
    state = sum(value.nbytes for states in optimizer.state.values() for value in states.values() if value.dim())
    peak = plan(model, images.shape, optimizer=name).training
    assert peak.moment == "optimizer, step"
    assert peak.memory.optimizer_state == state
    assert peak.memory.weights == sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    assert peak.memory.gradients + peak.memory.workspace == pytest.approx(allocated_peak(run), rel=0.02)


@needs_native
def test_a_process_takes_what_is_predicted():
    """The slope of the peak resident memory."""
    name, shape, batches = "densenet-bc-100-12", (3, 32, 32), (128, 448)
    measured = peak_memory_per_image("densenet_efficient.models:create_model", {"name": name}, shape, batches)
    smaller, larger = (plan(name, shape, batch=batch, optimizer="sgd").training.peak for batch in batches)
    assert (larger - smaller) / (batches[1] - batches[0]) / MIB == pytest.approx(measured, rel=0.08)


@pytest.mark.parametrize("levels", [["bottleneck", "none"], ["none", "bottleneck"]])
def test_mixed_levels_are_exact(levels):
    naive, efficient = make_pair()
    efficient.checkpointing = levels
    assert [block.checkpointing for name, block in efficient.features.named_children() if "block" in name] == levels
    images = make_images(3, 3, 40, 36)
    assert_close(step(efficient, images), step(naive, images))


def test_levels_are_set_and_kept():
    model = EfficientDenseNet(**SMALL, checkpointing=("bottleneck", "none"))
    assert model.checkpointing == ["bottleneck", "none"]
    assert EfficientDenseNet(**json.loads(json.dumps(model.config))).checkpointing == ["bottleneck", "none"]
    model.checkpointing = ["none", "none"]
    assert model.checkpointing == "none"
    for wrong, complaint in (
        (["none"], "one per block, 2; got 1"),
        (["none", "all"], "must be one of none, bottleneck, got 'all'"),
        (3, "must be a level, or a sequence of one per block"),
    ):
        with pytest.raises(ValueError, match=complaint):
            model.checkpointing = wrong
    assert model.checkpointing == "none"


def test_the_mix_is_the_cheapest_that_fits():
    """Against every mix; budgets from the peak of the smallest to that of the largest."""
    model = create_model("densenet121", num_classes=10)
    shape = buffers_of(model, (8, 3, 224, 224), "cpu")
    optimizer = OPTIMIZERS["adamw"]
    steps = {mix: training_step(shape, mix.levels, optimizer, "cpu") for mix in mixes(4, False)}
    peaks = {mix: step.peak().peak for mix, step in steps.items()}
    chosen = set()
    for budget in sorted(peaks.values()):
        cheapest = cheapest_mix(shape, optimizer, "cpu", budget, False)
        assert peaks[cheapest] <= budget
        costs = {mix: steps[mix].recomputed for mix, peak in peaks.items() if peak <= budget}
        assert costs[cheapest] == min(costs.values())
        chosen.add(cheapest)
    assert len(chosen) == 6
    assert peaks[Mix.least(4, False)] == min(peaks.values())
    assert steps[Mix(("none",) * 4, (False,) * 4)].recomputed == 0


def test_a_storage_is_offloaded_where_less_is_recomputed_for_it():
    shape, budget = on_a_gpu("densenet201"), 2**30
    here, away = (cheapest_mix(shape, OPTIMIZERS["adamw"], "cuda", budget, offload) for offload in (False, True))
    assert not any(here.offloaded) and away.offloaded == (True, False, False, False)
    steps = [training_step(shape, mix.levels, OPTIMIZERS["adamw"], "cuda", mix.offloaded) for mix in (here, away)]
    assert steps[1].recomputed < steps[0].recomputed / 2
    found = plan("densenet201", (64, 3, 224, 224), budget=budget, offload=True)
    assert (tuple(found.checkpointing), tuple(found.offloaded)) == away and found.fits
    assert found.on_host == 64 * 56 * 56 * 256 * 4


def buffers_of(model, input_shape, device):
    return shape_of(model, input_shape, torch.float32, device, usual_shape(list(model.features.children()), device))


def on_a_gpu(name):
    """The shape of this network there."""
    with torch.device("meta"):
        return buffers_of(create_model(name), (64, 3, 224, 224), "cuda")


def least_memory_on_a_gpu(name, offload):
    mix = Mix.least(4, offload)
    return training_step(on_a_gpu(name), mix.levels, OPTIMIZERS["adamw"], "cuda", mix.offloaded)


def test_nothing_is_offloaded_without_need():
    roomy = plan("densenet201", (64, 3, 224, 224), budget="100GiB", offload=True)
    assert roomy.checkpointing == ["none"] * 4 and roomy.on_host == 0


@pytest.mark.parametrize("level", LEVELS)
def test_where_a_storage_lives_that_is_offloaded(level):
    """All the time but between the next block's forward and its backward."""
    shape = buffers_of(EfficientDenseNet(**NETWORK), SHAPE, "cuda")
    arguments = shape, (level,) * 3, OPTIMIZERS["sgd"], "cuda"
    here, away = training_step(*arguments), training_step(*arguments, (True, False, False))
    pairs = zip(here.moments(), away.moments(), strict=True)
    saved = [(one.stage, one.action, one.saved - other.saved) for one, other in pairs]
    storage = shape.blocks[0].storage
    assert away.on_host == storage
    assert [moment for moment in saved if moment[2]] == [
        ("denseblock3", "forward", storage),
        ("denseblock3", "backward", storage),
    ]


def test_a_budget_says_which_storages_are_offloaded():
    with torch.device("meta"):
        model = create_model("densenet201")
    found = model.set_memory_budget("1GiB", (64, 3, 224, 224), offload=True)
    blocks = blocks_of(model)
    assert [block.offload for block in blocks] == found.offloaded == [True, False, False, False]
    model.set_memory_budget("1GiB", (64, 3, 224, 224))
    assert not any(block.offload for block in blocks)


@pytest.mark.parametrize("arguments", [{}, {"budget": "1GiB", "checkpointing": "none"}])
def test_offloading_is_for_a_budget(arguments):
    with pytest.raises(ValueError, match="to keep within a budget: give one, and no levels"):
        plan("densenet121", (1, 3, 224, 224), offload=True, **arguments)


def test_offloading_is_for_a_gpu():
    with pytest.raises(ValueError, match="this model is on the CPU: move it first"):
        plan(EfficientDenseNet(**NETWORK), SHAPE, budget="1GiB", offload=True)


def test_what_fits_is_the_largest():
    budget = "600MiB"
    found = plan("densenet121", (8, 3, 224, 224), budget=budget)
    assert found.fits
    assert plan("densenet121", (found.largest_batch, 3, 224, 224), budget=budget).fits
    assert not plan("densenet121", (found.largest_batch + 1, 3, 224, 224), budget=budget).fits
    assert plan("densenet121", (8, 3, found.largest_size, found.largest_size), budget=budget).fits
    assert not plan("densenet121", (8, 3, found.largest_size + 1, found.largest_size + 1), budget=budget).fits


def test_a_budget_is_applied_or_refused():
    model = EfficientDenseNet(**NETWORK)
    roomy = model.set_memory_budget("1GiB", SHAPE)
    assert model.checkpointing == "none" == roomy.checkpointing[0]
    tight = plan(model, SHAPE, checkpointing="bottleneck").training.peak
    applied = model.set_memory_budget(tight, SHAPE[1:], batch=SHAPE[0])
    assert applied.training.peak <= tight
    before = model.checkpointing
    assert applied.checkpointing == ([before] * 3 if isinstance(before, str) else before)
    with pytest.raises(ValueError, match=r"remedy: a batch of at most [123], or images of at most"):
        model.set_memory_budget(tight - 1, SHAPE)
    with pytest.raises(ValueError, match="remedy: a larger budget"):
        model.set_memory_budget("10KB", SHAPE)
    assert model.checkpointing == before


def test_stages_add_up():
    found = plan("densenet121", (4, 3, 224, 224), optimizer="sgd-momentum", checkpointing="none")
    model = create_model("densenet121")
    assert [stage.name for stage in found.stages] == ["stem", *(f"denseblock{i}" for i in range(1, 5)), "head"]
    weights = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    assert sum(stage.own.weights for stage in found.stages) == weights == found.training.memory.weights
    parameters = sum(parameter.nbytes for parameter in model.parameters())
    assert sum(stage.own.gradients for stage in found.stages) == parameters
    assert sum(stage.own.optimizer_state for stage in found.stages) == parameters
    rows = densenet_efficient.summary.total_costs(densenet_efficient.summary.summarize(model, (4, 3, 224, 224)))
    assert sum(stage.own.saved_activations for stage in found.stages) == rows.saved_none
    assert found.training.peak >= max(stage.peak for stage in found.stages)


def test_what_is_frozen_has_neither_gradients_nor_a_state():
    model = EfficientDenseNet(**NETWORK)
    model.features.denseblock2.requires_grad_(False)
    trained = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    stages = plan(model, SHAPE).stages
    assert sum(stage.own.gradients for stage in stages) == trained
    assert sum(stage.own.optimizer_state for stage in stages) == 2 * trained


def test_the_masks_of_a_dropout_are_saved():
    """A byte for each feature that the layers of a block add."""
    stages = [
        plan(EfficientDenseNet(**NETWORK, drop_rate=rate), SHAPE, checkpointing="none").stages for rate in (0.0, 0.2)
    ]
    masks = [more.own.saved_activations - less.own.saved_activations for less, more in zip(*stages, strict=True)]
    assert masks == [0, 4 * 16**2 * 2 * 8, 4 * 8**2 * 3 * 8, 4 * 4**2 * 3 * 8, 0]


def test_a_converted_network_has_the_same_plan():
    torchvision = pytest.importorskip("torchvision")
    with torch.device("meta"):
        converted = torchvision.models.densenet121()
    densenet_efficient.convert(converted)
    ours, theirs = plan("densenet121", (2, 3, 64, 64)), plan(converted, (2, 3, 64, 64))
    assert ours.training == theirs.training
    assert ours.stages == theirs.stages


@pytest.mark.parametrize(
    ("text", "count"),
    [
        *(("8GiB", 2**33), ("8 GB", 8 * 10**9), ("1.5MiB", 3 * 2**19), ("77", 77), (2**53 + 1, 2**53 + 1)),
        *(("1kb", 1000), ("2TB", 2 * 10**12), ("3TiB", 3 * 2**40)),
    ],
)
def test_sizes_are_read(text, count):
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "GiB", "8 Gibi", "-1GiB", "0", 0, -5, "8GiB each", "\u0663GiB"])
def test_other_sizes_are_refused(text):
    with pytest.raises(ValueError, match="expected one such as '8GiB'"):
        parse_bytes(text)


@pytest.mark.parametrize("value", [1.5, True, None])
def test_what_is_no_size(value):
    with pytest.raises(TypeError, match="budget must be an int"):
        parse_bytes(value)


@pytest.mark.parametrize(
    ("count", "as_count", "as_bytes"),
    [
        *((0, "0", "0"), (7, "7.00", "7.0 B"), (999, "999.00", "999.0 B"), (1000, "1.00 k", "1.0 KiB")),
        *((1234567, "1.23 M", "1.2 MiB"), (5e18, "5000.00 P", "4440.9 PiB")),
    ],
)
def test_sizes_are_written(count, as_count, as_bytes):
    assert (format_count(count), format_bytes(count)) == (as_count, as_bytes)


def test_bytes_of_parameters():
    """Kernels of convolutions alone are packed; the count of a norm's batches has eight bytes; none counts twice."""
    conv, norm, classifier = torch.nn.Conv2d(2, 3, 3, bias=False), torch.nn.BatchNorm2d(3), torch.nn.Linear(3, 5)
    norm.requires_grad_(False)
    counted = {conv}
    assert Parameters.of([norm, conv], 4, 2, counted) == Parameters(4 * (6 + 6) + 8, 0, 0, 4 * 3)
    assert Parameters.of([norm], 4, 2, counted) == Parameters(0, 0, 0, 0)
    assert Parameters.of([conv, classifier], 4, 2, set()) == Parameters(4 * 74, 4 * 74, 2 * 54, 4 * 54)


def test_only_float32_stays_under_autocast():
    model = torch.nn.Module()
    for own, planned, stored in (
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.float64, torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.float64, torch.float64),
    ):
        model.classifier = torch.nn.Linear(1, 1, dtype=own)
        assert stored_dtype(model, planned) == stored


def test_in_float64_the_stem_unfolds_its_images():
    """To columns of 3 * 7 * 7 values for each of 32 * 32 pixels."""
    stem = shape_of(EfficientDenseNet(**NETWORK), SHAPE, torch.float64, "cpu").stem
    assert stem.conv_out == 4 * 16 * 32 * 32 * 8
    assert (stem.forward_workspace, stem.backward_workspace) == (
        4 * 147 * 32 * 32 * 8 + stem.conv_out,
        2 * stem.conv_out,
    )


@pytest.mark.parametrize(("channels", "padded"), [(3, 16), (8, 0), (9, 32)])
def test_cudnn_pads_the_pixels_of_the_images(channels, padded):
    """To a multiple of 16 bytes, in a copy where they have none."""
    model = EfficientDenseNet(**NETWORK, in_channels=channels)
    stem = shape_of(model, (4, channels, 64, 64), torch.bfloat16, "cuda").stem
    assert stem.forward_workspace == stem.backward_workspace == 4 * 64 * 64 * padded
    assert stem.recomputed == 4 * 32 * 32 * 16 * channels * 49


@pytest.mark.parametrize(("device", "first", "gradients"), [("cpu", 6, 6), ("cuda", 10, 2)])
def test_bytes_of_a_block(device, first, gradients):
    """Of six images of ten pixels in parts of two all but the last are recomputed twice, or, with room, none is."""
    block = block_shape(
        "denseblock1", Parameters(0, 0, 0, 0), images=6, pixels=60, in_channels=8, layers=5, growth_rate=4, width=16,
        windows=7, out_channels=9, element=2, drops=True, device=device,
    )  # fmt: skip
    assert (block.input, block.storage, block.bottleneck) == (60 * 8 * 2, 60 * 28 * 2, 60 * 16 * 2)
    assert (block.bottleneck_part, block.gradient_part) == (20 * 16 * 2, 10 * gradients * 16 * 2)
    assert (block.masks, block.dropped) == (60 * 5 * 4, 60 * 4 * 2)
    assert (block.pooled, block.out) == (7 * 28 * 2, 7 * 9 * 2)
    read = (8, 12, 16, 20, 24)
    assert block.recomputed == tuple(
        10 * images * k * 16 for images, k in zip((first, 10, 10, 10, 10), read, strict=True)
    )


def test_a_network_without_a_stem_cannot_be_planned():
    model = torch.nn.Module()
    model.features = EfficientDenseNet(**NETWORK).features
    del model.features.conv0
    with pytest.raises(TypeError, match=r"expected an EfficientDenseNet, its name, or a converted .*, got Module"):
        blocks_of(model)


@pytest.mark.parametrize(("optimizer", "copies"), [("sgd", 0), ("adamw", 1)])
def test_on_a_gpu_the_optimizer_steps_all_parameters_at_once(optimizer, copies):
    shape = buffers_of(EfficientDenseNet(**NETWORK), SHAPE, "cuda")
    step = training_step(shape, ("none",) * 3, OPTIMIZERS[optimizer], "cuda")
    *_, moment = step.moments()
    assert step.memory(moment).workspace == copies * moment.gradients


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"optimizer": "newton"}, "unknown optimizer 'newton'; expected one of sgd"),
        ({"dtype": "int8"}, "dtype must be one of float32"),
        ({"checkpointing": ["none"]}, "one per block, 4; got 1"),
        ({"input_shape": (3, 224, 224)}, "has no batch"),
        ({"batch": 2}, r"must be \[C, H, W\]"),
        ({"input_shape": (1, 3, 8, 8)}, "too small"),
        ({"input_shape": (0, 3, 64, 64)}, "each entry of input_shape must be at least 1, got 0"),
        ({"optimizer": ["adam"]}, r"unknown optimizer \['adam'\]"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, complaint):
    with pytest.raises(ValueError, match=complaint):
        plan("densenet121", **{"input_shape": (1, 3, 224, 224)} | arguments)


def test_images_are_counted_in_whole_numbers():
    with pytest.raises(TypeError, match=r"each entry of input_shape must be an int, got 1\.5"):
        plan("densenet121", (1.5, 3, 224, 224))


@pytest.mark.parametrize(
    "model",
    [torch.nn.Linear(1, 1), NaiveDenseNet(**SMALL), EfficientDenseNet(**SMALL, spatial_dims=1)],
    ids=lambda m: type(m).__name__,
)
def test_other_models_are_refused(model):
    with pytest.raises(TypeError, match=r"EfficientDenseNet, its name|two-dimensional"):
        plan(model, (1, 3, 64, 64))


def test_the_command_prints_a_plan(capsys):
    assert main(["plan", "densenet201", "--input", "32x3x224x224", "--budget", "1GiB"]) == 0
    out = capsys.readouterr().out
    assert "denseblock3" in out and "fits into 1.0 GiB" in out and "…" not in out
    assert main(["plan", "densenet201", "--input", "32x3x224x224", "--checkpointing", *LEVELS, *LEVELS]) == 0
    assert "fits" not in capsys.readouterr().out
    assert main(["plan", "densenet201", "--input", "32x3x224x224", "--checkpointing", "none"]) == 0
    assert "denseblock3" in capsys.readouterr().out
    assert main(["plan", "densenet201", "--input", "64x3x224x224", "--budget", "1GiB", "--offload"]) == 0
    assert "In the host's pinned memory wait the storages of denseblock1: 196.0 MiB." in capsys.readouterr().out


def test_the_command_fails_where_nothing_fits(capsys):
    assert main(["plan", "densenet201", "--input", "64x3x224x224", "--budget", "500MiB"]) == 2
    captured = capsys.readouterr()
    assert "does not fit into 500.0 MiB" in captured.out
    assert captured.err.startswith("error: a training step of densenet201 on 64x3x224x224 needs")


@pytest.mark.parametrize("name", ["densenet121", "densenet161", "densenet169"])
def test_where_no_other_storage_lives_at_the_peak_offloading_does_not_lower_it(name):
    here, away = (least_memory_on_a_gpu(name, offload).peak() for offload in (False, True))
    saved = {stage.name: stage.own.saved_activations for stage in least_memory_on_a_gpu(name, False).stages()}
    assert here.moment == "denseblock1, backward"
    assert here.memory.saved_activations == saved["stem"] + saved["denseblock1"]
    assert away.peak == here.peak


@pytest.mark.parametrize("name", ["densenet201", "densenet264"])
def test_offloading_lowers_a_peak_in_a_later_block(name):
    here, away = (least_memory_on_a_gpu(name, offload).peak() for offload in (False, True))
    assert (here.moment, away.moment) == ("denseblock3, backward", "denseblock1, backward")
    assert away.peak < here.peak
