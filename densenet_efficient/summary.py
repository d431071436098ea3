"""What each layer of a DenseNet costs: parameters, multiply-adds and memory saved for the backward.

All figures follow from the modules and the shape of the input. Nothing is run or allocated, so a model on the
meta device and a batch of any size will do.

**Multiply-adds** are those of the convolutions and of the classifier as the architecture defines them. (The
efficient transition pools before its 1x1 convolution: the same result for a quarter of the transition's.)

**Saved memory** counts, each storage once, the feature maps that live from the forward to the backward. In
elements, with M = N * H * W pixels of the row's input, C its input channels, k the growth rate and z the
channels of the bottleneck (0 without one):

============  ===================================  ======================  ===========
row           naive                                none                    bottleneck
============  ===================================  ======================  ===========
stem          image, 2 * conv0's output, indices   image, conv0's output   image
first layer   M * (2 * C + 2 * z)                  M * (C + k + z)         M * (C + k)
other layers  M * (2 * C + 2 * z)                  M * (k + z)             M * k
transition    M * (2 * C + output channels)        0                       0
head          M * 2 * C                            0                       0
============  ===================================  ======================  ===========

- *naive*: a batch norm keeps its input (the concatenation, the bottleneck, conv0's output), a convolution and
  a pooling theirs (what the in-place ReLU or the transition's convolution gave); max pooling also keeps its
  indices, as int64.
- *none* and *bottleneck*: a block keeps one storage, where each layer fills k channels behind the block's
  input; `none` also keeps every bottleneck.
- The stem of small inputs is a single convolution: every implementation keeps the image.

Of `bottleneck` the free ones are left out (docs/planning.md), which a step saves without a higher peak. Left out as
vectors beside maps are the batch statistics (per channel) and the classifier's input `[N, C]`.
Dropout, off in every preset, adds its mask in every implementation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import nn

from .dimensions import AXES, AvgPool, Convolution, MaxPool, dims_of

COUNTS = {1: "three", 2: "four", 3: "five"}  # of sizes, by spatial dimensions
INDEX_BYTES = torch.int64.itemsize  # of the indices that torch's max pooling keeps

Shape = tuple[int, ...]
DenseNet = Any  # anything with torchvision's submodules; nn.Module would type each as Tensor | Module


@dataclass(frozen=True)
class Costs:
    """What adds up over layers: two counts, and the activations saved by each implementation in bytes."""

    parameters: int = 0
    multiply_adds: int = 0
    saved_naive: int = 0
    saved_none: int = 0
    saved_bottleneck: int = 0

    def __add__(self, other: Costs) -> Costs:
        return Costs(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))


@dataclass(frozen=True)
class SummaryRow:
    """One stage (`stem`, `denseblock1`, `transition1`, ..., `head`), or a dense layer of the block above.

    A block's costs are the sum of its layers': add up the stages or the layers, never both.
    """

    name: str
    is_layer: bool
    in_channels: int
    bottleneck_channels: int | None  # None unless the row is a layer with a bottleneck
    growth_rate: int | None  # None unless the row is a layer
    output_shape: Shape
    costs: Costs


def parse_input_shape(text: str) -> tuple[int, int, int, int]:
    """Read `"4x3x224x224"` as (batch, channels, height, width).

    Raises:
        ValueError: there are not four parts, or one is not a positive integer.
    """
    parts = text.split("x")
    if len(parts) != 4:
        raise ValueError(f"input {text!r} has {len(parts)} parts, expected 4: NxCxHxW, as in 4x3x224x224")
    for part in parts:
        if not (part.isascii() and part.isdigit() and int(part) > 0):
            raise ValueError(f"input {text!r}: {part!r} is not positive and whole; use NxCxHxW, as in 4x3x224x224")
    batch, channels, height, width = map(int, parts)
    return batch, channels, height, width


def summarize(model: DenseNet, input_shape: Sequence[int], dtype: torch.dtype = torch.float32) -> list[SummaryRow]:
    """The stages of `model` in order, each dense block followed by its layers.

    Args:
        model: an `EfficientDenseNet`, or another with the same submodules (`NaiveDenseNet`, torchvision's).
        input_shape: (N, C, H, W) of the images, or of one or three dimensions as the model's.
        dtype: of the images and of every activation.

    Raises:
        ValueError: the shape is not (N, C, H, W), has the wrong number of channels or too few pixels.
    """
    shape = _checked_shape(model, input_shape)
    itemsize = dtype.itemsize
    stem = _stem_row(model.features, shape, itemsize)
    rows = [stem]
    shape = stem.output_shape
    seen = set()
    for name, module in model.features._modules.items():
        if name.startswith("denseblock"):
            stage_rows = _block_rows(name, module, shape, itemsize)
        elif name.startswith("transition"):
            stage_rows = [_transition_row(name, module, shape, itemsize)]
        else:
            continue
        rows += map(_without_parameters, stage_rows) if module in seen else stage_rows
        seen.add(module)
        shape = stage_rows[0].output_shape
    return [*rows, _head_row(model, shape, itemsize)]


def total_costs(rows: Sequence[SummaryRow]) -> Costs:
    """The costs of the whole model, from all rows of `summarize`."""
    return sum((row.costs for row in rows if not row.is_layer), Costs())


def format_shape(shape: Sequence[int]) -> str:
    """(4, 3, 224, 224) as `4x3x224x224`."""
    return "x".join(map(str, shape))


def _checked_shape(model: DenseNet, input_shape: Sequence[int]) -> Shape:
    text = format_shape(input_shape)
    dims = dims_of(model.features.conv0)
    if len(input_shape) != dims + 2 or min(input_shape) < 1:
        raise ValueError(f"input {text} is not (N, C, {AXES[dims]}), {COUNTS[dims]} positive sizes")
    expected = model.features.conv0.in_channels
    if input_shape[1] != expected:
        raise ValueError(f"input {text} has {input_shape[1]} channels, expected {expected}")
    minimum = minimum_size(model)
    if min(input_shape[2:]) < minimum:
        needed = format_shape([minimum] * dims)
        raise ValueError(f"input {text} is too small, this topology needs at least {needed} pixels")
    return tuple(input_shape)


def minimum_size(model: DenseNet) -> int:
    """The smallest length of an axis that leaves one pixel at the head."""
    every = (module for _, module in model.features.named_modules(remove_duplicate=False))
    windows = [module for module in every if isinstance(module, Convolution | MaxPool | AvgPool)]
    size = 1
    for window in reversed(windows):
        kernel, stride, padding = _window(window)
        size = (size - 1) * stride + kernel - 2 * padding
    return size


def _stem_row(features: Any, shape: Shape, itemsize: int) -> SummaryRow:
    conv = features.conv0
    conv_shape = _output_shape(conv, shape, conv.out_channels)
    image = math.prod(shape) * itemsize
    parameters = _parameters(conv)
    multiply_adds = _multiply_adds(conv, conv_shape)
    if not hasattr(features, "pool0"):
        costs = Costs(parameters, multiply_adds, image, image, image)
        return _stage_row("stem", shape, conv_shape, costs)
    pool_shape = _output_shape(features.pool0, conv_shape, conv.out_channels)
    conv_output = math.prod(conv_shape) * itemsize
    costs = Costs(
        parameters + _parameters(features.norm0),
        multiply_adds,
        saved_naive=image + 2 * conv_output + math.prod(pool_shape) * INDEX_BYTES,
        saved_none=image + conv_output,
        saved_bottleneck=image,
    )
    return _stage_row("stem", shape, pool_shape, costs)


def _block_rows(name: str, block: Any, shape: Shape, itemsize: int) -> list[SummaryRow]:
    layers = [
        _layer_row(f"{name}.{layer_name}", layer, shape, itemsize) for layer_name, layer in block._modules.items()
    ]
    channels = shape[1] + sum(row.output_shape[1] for row in layers)
    costs = sum((row.costs for row in layers), Costs())
    return [_stage_row(name, shape, _with_channels(shape, channels), costs), *layers]


def _layer_row(name: str, layer: nn.Module, block_input: Shape, itemsize: int) -> SummaryRow:
    convolutions = [module for module in layer._modules.values() if isinstance(module, Convolution)]
    channels = convolutions[0].in_channels
    growth_rate = convolutions[-1].out_channels
    bottleneck = convolutions[0].out_channels if len(convolutions) == 2 else None
    filled = growth_rate if channels > block_input[1] else channels + growth_rate  # of the block's storage
    output_shape = _with_channels(block_input, growth_rate)
    per_channel = math.prod(_with_channels(block_input, 1)) * itemsize
    costs = Costs(
        parameters=_parameters(layer),
        multiply_adds=sum(_multiply_adds(conv, output_shape) for conv in convolutions),
        saved_naive=per_channel * 2 * (channels + (bottleneck or 0)),
        saved_none=per_channel * (filled + (bottleneck or 0)),
        saved_bottleneck=per_channel * filled,
    )
    return SummaryRow(
        name,
        is_layer=True,
        in_channels=channels,
        bottleneck_channels=bottleneck,
        growth_rate=growth_rate,
        output_shape=output_shape,
        costs=costs,
    )


def _transition_row(name: str, transition: Any, shape: Shape, itemsize: int) -> SummaryRow:
    conv_shape = _output_shape(transition.conv, shape, transition.conv.out_channels)
    costs = Costs(
        parameters=_parameters(transition),
        multiply_adds=_multiply_adds(transition.conv, conv_shape),
        saved_naive=(2 * math.prod(shape) + math.prod(conv_shape)) * itemsize,
    )
    output_shape = _output_shape(transition.pool, conv_shape, conv_shape[1])
    return _stage_row(name, shape, output_shape, costs)


def _head_row(model: DenseNet, shape: Shape, itemsize: int) -> SummaryRow:
    classifier = model.classifier
    costs = Costs(
        parameters=_parameters(model.features.norm5) + _parameters(classifier),
        multiply_adds=shape[0] * classifier.weight.numel(),
        saved_naive=2 * math.prod(shape) * itemsize,
    )
    return _stage_row("head", shape, (shape[0], classifier.out_features), costs)


def _stage_row(name: str, input_shape: Shape, output_shape: Shape, costs: Costs) -> SummaryRow:
    return SummaryRow(
        name,
        is_layer=False,
        in_channels=input_shape[1],
        bottleneck_channels=None,
        growth_rate=None,
        output_shape=output_shape,
        costs=costs,
    )


def _without_parameters(row: SummaryRow) -> SummaryRow:
    """A row of a stage that comes again: its parameters were counted where it came first."""
    return replace(row, costs=replace(row.costs, parameters=0))


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _multiply_adds(conv: Convolution, output_shape: Shape) -> int:
    return math.prod(_with_channels(output_shape, 1)) * conv.weight.numel()


def _with_channels(shape: Shape, channels: int) -> Shape:
    return (shape[0], channels, *shape[2:])


def _output_shape(module: Any, shape: Shape, channels: int) -> Shape:
    kernel, stride, padding = _window(module)
    return (shape[0], channels, *((size + 2 * padding - kernel) // stride + 1 for size in shape[2:]))


def _window(module: Any) -> tuple[int, int, int]:
    """Kernel size, stride and padding of a convolution or a pooling; all of this topology's are square."""
    values = (module.kernel_size, module.stride, module.padding)
    kernel, stride, padding = (value[0] if isinstance(value, tuple) else value for value in values)
    return kernel, stride, padding
