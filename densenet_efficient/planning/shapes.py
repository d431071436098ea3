"""The buffers of each stage in bytes, from the counts of `densenet_efficient.summary`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..dense_layers import has_room, keeps_gradients, recomputed_parts
from ..kernels import accumulation_dtype
from ..operator_calls import StageBlock
from ..stem import images_at_a_time
from ..summary import SummaryRow, summarize

LOW_PRECISION = (torch.bfloat16, torch.float16)
CUDNN_PIXEL = 16  # bytes of which the channels of a pixel have to be a multiple


@dataclass(frozen=True)
class Parameters:
    """Bytes of parameters and buffers."""

    weights: int  # with the buffers
    gradients: int  # of those parameters that require one
    packed: int  # what an inference on the CPU keeps of the convolutions besides
    largest: int  # of one parameter

    @classmethod
    def of(
        cls, modules: Sequence[nn.Module], weight_bytes: int, packed_bytes: int, counted: set[nn.Module]
    ) -> Parameters:
        """Of these modules together, but for those that are ``counted``, which they join.

        ``weight_bytes`` and ``packed_bytes`` per element.
        """
        new = [module for module in modules if module not in counted]
        counted.update(new)
        own = [parameter for module in new for parameter in module.parameters()]
        buffers = [buffer for module in new for buffer in module.buffers()]
        weights = sum(parameter.numel() for parameter in own) * weight_bytes
        return cls(
            weights + sum(b.numel() * (weight_bytes if b.is_floating_point() else b.itemsize) for b in buffers),
            sum(parameter.numel() for parameter in own if parameter.requires_grad) * weight_bytes,
            sum(parameter.numel() for parameter in own if parameter.dim() > 2) * packed_bytes,
            max((parameter.numel() for parameter in own), default=0) * weight_bytes,
        )


@dataclass(frozen=True)
class StemShape:
    """The bytes of the stem's buffers."""

    parameters: Parameters
    images: int  # as given
    cast: int  # of the images in autocast's dtype; 0 without it
    conv_out: int  # 0 in the stem of small inputs, which has neither norm nor pooling
    out: int
    forward_workspace: int  # of the convolution
    backward_workspace: int
    recomputed: int  # multiply-adds of the convolution


@dataclass(frozen=True)
class BlockShape:
    """The bytes of the buffers of a dense block and its exit; M pixels, C channels of the storage."""

    name: str
    parameters: Parameters  # with those of a transition
    input: int  # [M, C0]
    storage: int  # [M, C]
    bottleneck: int  # [M, K], 0 without
    layers: int
    bottleneck_part: int  # of those images that recompute theirs together
    gradient_part: int  # the gradients of bottlenecks that are at hand with them
    masks: int  # of the dropout
    dropped: int  # [M, k], a mask as it is multiplied
    pooled: int  # [M', C] of the exit
    out: int  # [M', C'] of the exit
    recomputed: tuple[int, ...]  # multiply-adds of a backward, for the bottleneck of each layer


@dataclass(frozen=True)
class NetworkShape:
    """The buffers of a network in bytes, for one shape of input."""

    batch: int
    stem: StemShape
    blocks: list[BlockShape]
    head: Parameters
    usual: NetworkShape | None = None  # the same at a usual size, by which free bottlenecks are found

    @property
    def every_parameters(self) -> list[Parameters]:
        return [self.stem.parameters, *(block.parameters for block in self.blocks), self.head]


def blocks_of(model: Any) -> list[StageBlock]:
    """The dense blocks of a network that has torchvision's submodules, and runs as this library's stages.

    Raises a TypeError for any other model.
    """
    features = getattr(model, "features", None)
    names = features._modules if isinstance(features, nn.Sequential) else {}
    blocks = [module for name, module in names.items() if name.startswith("denseblock")]
    if "conv0" not in names or not blocks or not all(isinstance(block, StageBlock) for block in blocks):
        raise TypeError(
            f"expected an EfficientDenseNet, its name, or a converted torchvision DenseNet, got {type(model).__name__}"
        )
    if not isinstance(names["conv0"], nn.Conv2d):
        raise TypeError("the planner knows networks of two-dimensional images; this one has spatial_dims 1 or 3")
    return [block for block in blocks if isinstance(block, StageBlock)]


def shape_of(
    model: Any, input_shape: Sequence[int], dtype: torch.dtype, device: str, usual: NetworkShape | None = None
) -> NetworkShape:
    """The buffers of ``model`` for images [N, C, H, W], computed in ``dtype``.

    ``usual``: what `usual_shape` gives; without it no bottleneck is free.
    """
    rows = summarize(model, input_shape, dtype)
    stored = stored_dtype(model, dtype)
    element = dtype.itemsize
    modules = model.features._modules
    counted: set[nn.Module] = set()  # a module may come twice

    def parameters(*chosen: nn.Module) -> Parameters:
        return Parameters.of(chosen, stored.itemsize, element, counted)

    stem_names = [name for name in ("conv0", "norm0", "relu0", "pool0") if name in modules]
    own = parameters(*(modules[name] for name in stem_names))
    stem = _stem_shape(rows[0], model.features.conv0, input_shape, dtype, stored, device, own)
    blocks, stages = [], [row for row in rows[1:-1] if not row.is_layer]
    for index, row in enumerate(stages):
        if row.name.startswith("transition"):
            continue
        transition = next((r for r in stages[index + 1 : index + 2] if r.name.startswith("transition")), None)
        parts = [modules[row.name], *([modules[transition.name]] if transition else [])]
        layers = [layer for layer in rows if layer.is_layer and layer.name.startswith(f"{row.name}.")]
        images, channels, *axes = row.output_shape
        out_shape = transition.output_shape if transition else (images, channels)
        blocks.append(
            block_shape(
                row.name,
                parameters(*parts),
                images=images,
                pixels=images * math.prod(axes),
                in_channels=row.in_channels,
                layers=len(layers),
                growth_rate=layers[0].growth_rate or 0,
                width=layers[0].bottleneck_channels or 0,
                windows=math.prod(out_shape) // out_shape[1],
                out_channels=out_shape[1],
                element=element,
                drops=_drops(modules[row.name]),
                device=device,
            )
        )
    head = parameters(modules["norm5"], model.classifier)
    return NetworkShape(input_shape[0], stem, blocks, head, usual)


def stored_dtype(model: Any, dtype: torch.dtype) -> torch.dtype:
    """The dtype of the parameters: their own under autocast to ``dtype``, else ``dtype`` itself."""
    own: torch.dtype = model.classifier.weight.dtype
    return own if dtype in LOW_PRECISION and own == accumulation_dtype(dtype) else dtype


def _stem_shape(
    row: SummaryRow,
    conv: nn.Conv2d,
    input_shape: Sequence[int],
    dtype: torch.dtype,
    stored: torch.dtype,
    device: str,
    parameters: Parameters,
) -> StemShape:
    elements = math.prod(input_shape)
    out = math.prod(row.output_shape) * dtype.itemsize
    conv_out = row.costs.saved_none - row.costs.saved_bottleneck
    gradient = conv_out or out
    images = input_shape[0]
    unfolds = device == "cpu" and dtype == torch.float64  # oneDNN has no float64: torch unfolds the images (im2col)
    columns = gradient // conv.out_channels * conv.weight[0].numel() if unfolds else 0
    part = 1.0  # of the batch, convolved at a time
    if conv_out:
        pixels = conv_out // (images * conv.out_channels * dtype.itemsize)
        part = min(images_at_a_time(device, images, pixels) / images, 1)
    if device == "cpu":
        workspaces = int(part * (columns + conv_out)), int(part * 2 * gradient)
    else:
        workspaces = (_padded_images(input_shape, dtype),) * 2
    return StemShape(
        parameters,
        images=elements * stored.itemsize,
        cast=elements * dtype.itemsize if stored != dtype else 0,
        conv_out=conv_out,
        out=out,
        forward_workspace=workspaces[0],
        backward_workspace=workspaces[1],
        recomputed=row.costs.multiply_adds if conv_out else 0,
    )


def _padded_images(input_shape: Sequence[int], dtype: torch.dtype) -> int:
    """Bytes of cuDNN's copy of the images, whose pixels it pads to 16 bytes (seen on an H100, in bfloat16)."""
    images, channels, *axes = input_shape
    pixel = channels * dtype.itemsize
    return images * math.prod(axes) * (pixel + -pixel % CUDNN_PIXEL) if pixel % CUDNN_PIXEL else 0


def block_shape(
    name: str,
    parameters: Parameters,
    *,
    images: int,
    pixels: int,
    in_channels: int,
    layers: int,
    growth_rate: int,
    width: int,
    windows: int,
    out_channels: int,
    element: int,
    drops: bool,
    device: str,
) -> BlockShape:
    """Of ``pixels`` of all images, in ``layers`` that add ``growth_rate`` channels each, with bottlenecks of ``width``.

    The exit pools ``windows`` pixels, to ``out_channels``. ``element``: bytes of one.
    """
    channels = in_channels + layers * growth_rate
    parts = recomputed_parts(images, width, channels)
    together = -(-images // parts)
    together_of_gradients = images if keeps_gradients(parts, torch.device(device)) else together

    def recomputed(layer: int) -> int:
        """Multiply-adds; of all parts but the last twice."""
        read = in_channels + layer * growth_rate
        last = images if has_room(width, channels, channels - read - growth_rate, torch.device(device)) else together
        return pixels // images * (2 * images - last) * read * width

    return BlockShape(
        name,
        parameters,
        input=pixels * in_channels * element,
        storage=pixels * channels * element,
        bottleneck=pixels * width * element,
        layers=layers,
        bottleneck_part=pixels // images * together * width * element,
        gradient_part=pixels // images * together_of_gradients * width * element,
        masks=pixels * (channels - in_channels) if drops else 0,
        dropped=pixels * growth_rate * element if drops else 0,
        pooled=windows * channels * element,
        out=windows * out_channels * element,
        recomputed=tuple(map(recomputed, range(layers))),
    )


def _drops(block: nn.Module) -> bool:
    return any(getattr(layer, "drop_rate", 0) > 0 for layer in block.children())
