"""The summary against the modules' shapes, torch's count of operations, and what autograd really keeps."""

import dataclasses
import io
import json

import pytest
import torch
from cases import saved_bytes
from rich.console import Console
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from densenet_efficient import EfficientDenseNet
from densenet_efficient.models import create_model
from densenet_efficient.planning.shapes import blocks_of
from densenet_efficient.reference import NaiveDenseNet
from densenet_efficient.summary import parse_input_shape, summarize, total_costs
from densenet_efficient.summary_table import print_summary

VARIANTS = {
    "imagenet": {},
    "compression": {"compression": 0.7, "block_config": (1, 2, 1)},
    "plain": {"bottleneck": False, "compression": 1.0},
    "small_inputs": {"small_inputs": True},
    "one_block_plain_small_inputs": {"block_config": (3,), "bottleneck": False, "small_inputs": True},
}


@pytest.fixture(params=VARIANTS)
def arguments(request):
    small = {
        "growth_rate": 4,
        "block_config": (2, 3),
        "num_init_features": 8,
        "num_classes": 5,
        "in_channels": 2,
    }
    return small | VARIANTS[request.param]


pytestmark = pytest.mark.usefixtures("one_thread")


def printed(*arguments):
    text = io.StringIO()
    print_summary(*arguments, console=Console(file=text))
    return text.getvalue().splitlines()


def classifier_input(model, images):
    return len(images) * model.classifier.weight[0].nbytes


@pytest.mark.parametrize("size", [(32, 32), (33, 47)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_naive_saves_what_autograd_keeps(arguments, size, dtype):
    model = NaiveDenseNet(**arguments).to(dtype)
    images = torch.randn(3, 2, *size, dtype=dtype)
    normalised = sum(norm.num_features for norm in model.modules() if isinstance(norm, nn.BatchNorm2d))
    vectors = 2 * normalised * dtype.itemsize + classifier_input(model, images)
    expected = total_costs(summarize(model, images.shape, dtype)).saved_naive
    assert saved_bytes(model, images) == expected + vectors


@pytest.mark.parametrize("level", ["none", "bottleneck"])
@pytest.mark.parametrize("size", [(32, 32), (33, 47)])
def test_each_level_saves_what_autograd_keeps(arguments, size, level):
    model = EfficientDenseNet(**arguments, checkpointing=level)
    for block in blocks_of(model):
        block.free_bottlenecks = {}  # which are not counted
    images = torch.randn(3, 2, *size)
    rows = summarize(model, images.shape)
    shared = sum(row.output_shape[1] for row in rows if row.name.startswith("denseblock") and not row.is_layer)
    bottlenecks = sum(row.bottleneck_channels or 0 for row in rows)
    stem = 0 if arguments.get("small_inputs") else arguments["num_init_features"]
    vectors = 2 * (shared + bottlenecks + stem) * 4 + classifier_input(model, images)
    expected = getattr(total_costs(rows), f"saved_{level}")
    assert saved_bytes(model, images) == expected + vectors


def test_multiply_adds_are_those_that_torch_counts(arguments):
    with torch.device("meta"):
        model = NaiveDenseNet(**arguments)
        images = torch.empty(3, 2, 33, 47)
    counter = FlopCounterMode(display=False)
    with counter:
        model(images)
    assert 2 * total_costs(summarize(model, images.shape)).multiply_adds == counter.get_total_flops()


def test_shapes_and_parameters_are_those_of_the_modules(arguments):
    with torch.device("meta"):
        model = NaiveDenseNet(**arguments)
        images = torch.empty(3, 2, 33, 47)
    shapes = {}
    for name, module in model.features.named_modules():
        module.register_forward_hook(lambda _, inputs, output, name=name: shapes.update({name: output.shape}))
    logits = model(images)
    rows = summarize(model, images.shape)
    stem, *body, head = rows
    assert stem.output_shape == shapes.get("pool0", shapes["conv0"])
    assert [row.name for row in body] == [
        name for name in shapes_in_order(model) if name.startswith(("dense", "transition"))
    ]
    assert all(row.output_shape == shapes[row.name] for row in body)
    assert head.output_shape == logits.shape
    assert total_costs(rows).parameters == sum(parameter.numel() for parameter in model.parameters())
    layers = [row for row in rows if row.is_layer]
    blocks = [row for row in rows if row.name.startswith("denseblock") and not row.is_layer]
    assert sum((row.costs for row in layers[1:]), layers[0].costs) == sum(
        (row.costs for row in blocks[1:]), blocks[0].costs
    )


def shapes_in_order(model):
    """Stages and dense layers, as `summarize` orders them."""
    for name, stage in model.features.named_children():
        yield name
        if name.startswith("denseblock"):
            yield from (f"{name}.{layer}" for layer, _ in stage.named_children())


@pytest.mark.parametrize(
    ("name", "naive", "none", "bottleneck"),
    [
        ("densenet121", 130.4, 26.9, 6.4),
        ("densenet169", 157.3, 28.4, 6.7),
        ("densenet201", 203.0, 30.5, 7.2),
        ("densenet264", 277.6, 33.0, 7.8),
        ("densenet161", 242.8, 42.7, 9.9),
    ],
)
def test_megabytes_per_image(name, naive, none, bottleneck):
    """The figures of the design, at any batch: nothing is allocated."""
    with torch.device("meta"):
        model = create_model(name)
    for batch in (1, 10**9):
        total = total_costs(summarize(model, (batch, 3, 224, 224)))
        saved = (total.saved_naive, total.saved_none, total.saved_bottleneck)
        assert [round(value / batch / 1e6, 1) for value in saved] == [naive, none, bottleneck]


def test_half_precision_halves_all_but_the_indices():
    with torch.device("meta"):
        model = create_model("densenet121")
    shape = (2, 3, 224, 224)
    single, half = (total_costs(summarize(model, shape, dtype)) for dtype in (torch.float32, torch.bfloat16))
    indices = 2 * 64 * 56 * 56 * 8
    assert half.saved_naive - indices == (single.saved_naive - indices) / 2
    assert half.saved_none == single.saved_none / 2
    assert half.saved_bottleneck == single.saved_bottleneck / 2


def test_prints_the_table():
    lines = printed("densenet201", (4, 3, 224, 224))
    cells = [line.split() for line in lines]
    start = next(index for index, row in enumerate(cells) if row[:1] == ["denseblock1"])
    block, *layers, transition = cells[start : start + 8]
    assert block[1:3] == ["64", "4x256x56x56"]
    # Of 4 * 56**2 pixels in float32: 2 * (864 + 6 * 128) channels, 256 + 6 * 128, and 256.
    assert block[-6:] == ["156.2", "MiB", "49.0", "MiB", "12.2", "MiB"]
    assert cells[start - 3][-3:] == ["naive", "none", "bottleneck"]
    assert lines[0].strip() == "densenet201, input 4x3x224x224, float32"
    assert lines[-1].startswith('A step at "bottleneck" also saves the bottlenecks that raise no peak')
    assert [row[:5] for row in layers] == [
        [f"denselayer{index + 1}", str(64 + 32 * index), "128", "32", "4x32x56x56"] for index in range(6)
    ]
    assert transition[:3] == ["transition1", "256", "4x128x28x28"]
    total, per_image, ratios = (next(row for row in cells if row[:1] == [name]) for name in ("total", "per", "naive"))
    assert total[1] == "20,013,928"
    assert per_image[2:] == ["4.29", "G", "193.6", "MiB", "29.1", "MiB", "6.9", "MiB"]
    assert ratios[3:] == ["1.0x", "6.7x", "28.2x"]


def test_the_weights_of_a_table_are_not_drawn():
    before = torch.get_rng_state()
    printed("densenet121", (1, 3, 224, 224))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ["densenet161", "densenet-bc-190-40", "densenet-40-12", "densenet-b-100-12"])
def test_the_table_fits_120_columns(name):
    lines = printed(name, (1024, 3, 1024, 1024))
    assert max(map(len, lines)) <= 120
    assert not any("…" in line for line in lines)  # nothing cut off


def test_rows_become_json():
    with torch.device("meta"):
        rows = summarize(create_model("densenet-40-12"), (2, 3, 32, 32))
    loaded = json.loads(json.dumps([dataclasses.asdict(row) for row in rows]))
    assert loaded[0]["output_shape"] == [2, 16, 32, 32]
    assert loaded[1]["costs"]["parameters"] == rows[1].costs.parameters


def test_parse_input_shape():
    assert parse_input_shape("4x3x224x192") == (4, 3, 224, 192)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("3x224x224", "3 parts, expected 4"),
        ("4x3x224x224x1", "5 parts, expected 4"),
        ("", "1 parts, expected 4"),
        ("4x3x224xwide", "'wide' is not positive and whole"),
        ("4x3x224x", "'' is not positive and whole"),
        ("4x3x22.5x224", "'22.5' is not positive and whole"),
        ("0x3x224x224", "'0' is not positive and whole"),
        ("4x3x-224x224", "'-224' is not positive and whole"),
        ("4x3x²x224", "'²' is not positive and whole"),
    ],
)
def test_malformed_input_shapes(text, complaint):
    with pytest.raises(ValueError, match="NxCxHxW") as raised:
        parse_input_shape(text)
    assert complaint in str(raised.value)


@pytest.mark.parametrize(
    ("name", "shape", "complaint"),
    [
        ("densenet007", (4, 3, 224, 224), "densenet007.*densenet121"),
        ("densenet121", (4, 1, 224, 224), "4x1x224x224 has 1 channels, expected 3"),
        ("densenet121", (3, 224, 224), "3x224x224 is not"),
        ("densenet121", (0, 3, 224, 224), "0x3x224x224 is not"),
        ("densenet121", (4, 3, 224, 28), "4x3x224x28 is too small.*29x29"),
        ("densenet-40-12", (4, 3, 3, 32), "4x3x3x32 is too small.*4x4"),
    ],
)
def test_what_does_not_fit_is_refused(name, shape, complaint):
    with pytest.raises(ValueError, match=complaint):
        print_summary(name, shape)


@pytest.mark.parametrize(("small_inputs", "minimum"), [(False, 29), (True, 8)])
def test_the_smallest_size_is_the_smallest_that_runs(small_inputs, minimum):
    model = NaiveDenseNet(4, (1, 1, 1, 1), 8, small_inputs=small_inputs).eval()
    assert model(torch.randn(1, 3, minimum, minimum)).shape == (1, 1000)
    assert summarize(model, (1, 3, minimum, minimum))
    with pytest.raises(RuntimeError, match="too small"):
        model(torch.randn(1, 3, minimum - 1, minimum))
    with pytest.raises(ValueError, match=f"{minimum}x{minimum}"):
        summarize(model, (1, 3, minimum - 1, minimum))


@pytest.mark.parametrize(("dims", "size"), [(1, 256), (3, 32)])
def test_other_dimensions(dims, size):
    """Parameters and multiply-adds as counted by running the naive model."""
    arguments = {"growth_rate": 4, "block_config": (2, 2), "num_init_features": 8, "num_classes": 5}
    with torch.device("meta"):
        model = EfficientDenseNet(**arguments, spatial_dims=dims)
    shape = (2, 3, *[size] * dims)
    total = total_costs(summarize(model, shape))
    assert total.parameters == sum(parameter.numel() for parameter in model.parameters())
    naive, counted = NaiveDenseNet(**arguments, spatial_dims=dims), []
    for module in naive.modules():
        if isinstance(module, nn.Conv1d | nn.Conv3d | nn.Linear):
            module.register_forward_hook(
                lambda module, _, out: counted.append(out.numel() // out.shape[1] * module.weight.numel())
            )
    naive(torch.zeros(shape))
    assert total.multiply_adds == sum(counted)
    with pytest.raises(ValueError, match=r"is not \(N, C, (L\), three|D, H, W\), five) positive sizes"):
        summarize(model, (2, 3, 64, 64))
    with pytest.raises(ValueError, match=r"too small, this topology needs at least \d+(x\d+x\d+)? pixels"):
        summarize(model, (2, 3, *[1] * dims))
