"""The loop over the layers of a dense block, over any backend.

`native_layers` is the same loop in C++ for the CPU's; on a GPU `taped_layers` records this one and repeats it.

A layer reads the prefix of its input channels and writes its k new ones into its slot. In the backward it takes the
finished gradient of its slot to the gradient of its inputs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from . import kernels
from .batch_norm import Affine, Norm, Projection
from .dropout import drop
from .kernels import spatial
from .layout import as_rows, empty_gradient
from .stage import Stage, StageOutput

MOST_PARTS = 4  # of the images, where bottlenecks are recomputed in parts


def forward_layers(
    stage: Stage,
    backend: ModuleType,
    storage: Tensor,
    size: spatial.Size,
    statistics: Tensor,
    bottleneck_statistics: Tensor,
    saved_bottlenecks: int,
) -> list[Tensor]:
    """Fills the slots of ``storage`` [M, C] behind the block's input, and the statistics of what was computed.

    Returns the bottleneck outputs [M, K] of the last ``saved_bottlenecks`` layers.
    """
    mean, variance = statistics.unbind()
    with_statistics = stage.needs_statistics
    bottlenecks: list[Tensor] = []  # the first serves all layers up to the first whose output is saved
    first_saved = len(stage.layers) - saved_bottlenecks
    channels = stage.input_channels
    for index, layer in enumerate(stage.layers):
        columns = slice(channels, channels + layer.growth_rate)
        inputs, slot = storage[:, :channels], storage[:, columns]
        slot_statistics = (mean[columns], variance[columns]) if with_statistics else (None, None)
        affine = layer.norm1.affine(backend, mean[:channels], variance[:channels])
        weight = layer.conv1
        if layer.norm2 is not None and layer.conv2 is not None:
            if index > first_saved or not bottlenecks:
                bottlenecks.append(kernels.empty_kept(storage, storage.shape[0], stage.bottleneck_channels))
            bottleneck, stats = bottlenecks[-1], bottleneck_statistics[index].unbind()
            wanted = stats if layer.norm2.running is None else (None, None)
            backend.bn_relu_conv1x1(inputs, affine.scale, affine.shift, layer.conv1, bottleneck, *wanted)
            stage.merge(*wanted)
            inputs, affine, weight = bottleneck, layer.norm2.affine(backend, *stats), layer.conv2
        fused_statistics = slot_statistics if layer.dropout is None else (None, None)
        spatial.bn_relu_conv(
            backend, inputs, affine.scale, affine.shift, weight, size, layer.dilation, slot, *fused_statistics
        )
        if layer.dropout is not None:
            drop(slot, layer.dropout, stage.drop_rate)
            if with_statistics:
                backend.channel_stats(slot, *slot_statistics)
        stage.merge(*slot_statistics)
        channels += layer.growth_rate
    return bottlenecks if saved_bottlenecks else []


def backward_layers(
    stage: Stage,
    saved: StageOutput,
    grad: Tensor,
    projection: Projection,
    input_needed: bool,
    layers_needed: list[list[bool]],
) -> list[list[Tensor | None]]:
    """The gradients of the layers' parameters; where ``input_needed``, ``grad`` [M, C] ends with that of the input.

    ``grad`` begins as the gradient of the storage without what the layers add, ``projection`` likewise.
    """
    storage, mean = as_rows(saved.features), saved.statistics[0]
    backend = projection.backend
    layer_grads: list[list[Tensor | None]] = [[None] * len(needed) for needed in layers_needed]
    lowest = 0 if input_needed else _first_needed(layers_needed)
    scratch: dict[str, Tensor] = {}
    stop = storage.shape[1]
    for index in range(len(stage.layers) - 1, lowest - 1, -1):
        layer = stage.layers[index]
        start = stop - layer.growth_rate
        projection.apply(grad[:, start:stop], storage[:, start:stop], mean, start, stop)
        if layer.dropout is not None:
            drop(grad[:, start:stop], layer.dropout, stage.drop_rate)
        below_needed = input_needed or index > lowest
        backward = _LayerBackward(backend, stage, index, saved, storage[:, :start], grad, below_needed, scratch)
        layer_grads[index] = backward.run(layers_needed[index], projection)
        stop = start
    if input_needed:
        projection.apply(grad[:, :stop], storage[:, :stop], mean, 0, stop)
    return layer_grads


class _LayerBackward:
    """The backward of one layer: from the finished gradient of its slot to the gradient buffer of its inputs."""

    def __init__(
        self,
        backend: ModuleType,
        stage: Stage,
        index: int,
        saved: StageOutput,
        inputs: Tensor,
        grad: Tensor,
        below_needed: bool,
        scratch: dict[str, Tensor],
    ) -> None:
        self.layer = layer = stage.layers[index]
        self.synchronisation = stage.synchronisation
        self.index = index
        self.saved = saved
        self.saved_bottleneck = saved.bottleneck_of(index)
        self.inputs = inputs  # [M, C_l], the prefix of the storage
        channels = inputs.shape[1]
        self.inputs_grad = grad[:, :channels] if below_needed else None
        self.slot_grad = grad[:, channels : channels + layer.growth_rate]
        self.scratch = scratch
        self.rows = inputs.shape[0]
        self.size = tuple(saved.features.shape[2:])
        self.backend = backend
        self.room = self._room(grad)
        self.parts = self._parts(grad.shape[1])
        self.keeps_gradient = keeps_gradients(len(self.parts), grad.device)
        mean, variance = saved.statistics.unbind()
        self.affine = layer.norm1.affine(self.backend, mean[:channels], variance[:channels])

    def _room(self, grad: Tensor) -> Tensor | None:
        """[M, K] for all recomputed bottlenecks at once, in gradients that are done with; None where it has none."""
        width, done = self.layer.conv1.shape[0], grad.shape[1] - self.inputs.shape[1] - self.layer.growth_rate
        return grad[:, -width:] if has_room(width, grad.shape[1], done, grad.device) else None

    def _parts(self, storage_channels: int) -> list[slice]:
        """The rows of those images that recompute their bottlenecks together; those of the last part are the most."""
        pixels, width = math.prod(self.size), self.layer.conv1.shape[0]
        images = self.rows // pixels
        is_whole = self.layer.conv2 is None or self.saved_bottleneck is not None or self.room is not None
        parts = 1 if is_whole else recomputed_parts(images, width, storage_channels)
        ends = [images * part // parts * pixels for part in range(parts + 1)]
        return [slice(start, stop) for start, stop in itertools.pairwise(ends)]

    def run(self, needed: list[bool], projection: Projection) -> list[Tensor | None]:
        """The gradients of the layer's parameters, None where not needed."""
        if self.layer.conv2 is None:
            return self._plain(needed, projection)
        return self._bottleneck(needed, projection)

    def _plain(self, needed: list[bool], projection: Projection) -> list[Tensor | None]:
        weight, bias, conv = needed
        sums = self._sums(self.inputs.shape[1], weight or bias or self.inputs_grad is not None)
        conv_grad = self._like(self.layer.conv1, conv)
        affine = self.affine
        spatial.bn_relu_conv_backward(
            self.backend, self.slot_grad, self.inputs, affine.mean, affine.scale, affine.shift, self.layer.conv1,
            self.size, self.layer.dilation, self.inputs_grad, True, conv_grad, *sums,
        )  # fmt: skip
        return [*self._norm_grads(self.layer.norm1, affine, sums, projection), conv_grad]

    def _bottleneck(self, needed: list[bool], projection: Projection) -> list[Tensor | None]:
        layer, affine = self.layer, self.affine
        assert layer.norm2 is not None and layer.conv2 is not None
        weight1, bias1, conv1, weight2, bias2, conv2 = needed
        norm1_needed = weight1 or bias1 or self.inputs_grad is not None
        bottleneck_needed = norm1_needed or conv1
        width = layer.conv1.shape[0]
        affine2 = layer.norm2.affine(self.backend, *self.saved.bottleneck_statistics[self.index].unbind())
        outputs2 = (self._like(layer.conv2, conv2), *self._sums(width, bottleneck_needed or weight2 or bias2))
        for part in self.parts:
            bottleneck = self._bottleneck_output(part)
            own = outputs2 if part is self.parts[0] else _empty_like(outputs2)
            gradient = self._bottleneck_grad(part) if bottleneck_needed else None
            self._conv2_backward(part, bottleneck, affine2, gradient, own)
            if own is not outputs2:
                _add(outputs2, own)
        conv2_grad, *sums2 = outputs2
        finish = Projection(self.backend, width, affine2.mean, self.synchronisation)
        norm2_grads = self._norm_grads(layer.norm2, affine2, sums2, finish)
        finish.synchronise(slice(None))
        if not bottleneck_needed:
            return [None, None, None, *norm2_grads, conv2_grad]

        outputs = (self._like(layer.conv1, conv1), *self._sums(self.inputs.shape[1], norm1_needed))
        for part in reversed(self.parts):  # the bottleneck of the last is at hand
            is_last = part is self.parts[-1]
            gradient = self._bottleneck_grad(part)
            if not is_last:
                bottleneck = self._bottleneck_output(part)
                if not self.keeps_gradient:
                    self._conv2_backward(part, bottleneck, affine2, gradient, (None, *self._sums(width, True)))
            own = outputs if is_last else _empty_like(outputs)
            self.backend.bn_relu_conv1x1_backward(
                gradient, bottleneck, affine2.mean, finish.slope, finish.offset, self.inputs[part],
                affine.mean, affine.scale, affine.shift, layer.conv1, _of(part, self.inputs_grad), *own,
            )  # fmt: skip
            if not is_last:
                _add(outputs, own)
        conv1_grad, *sums = outputs
        return [*self._norm_grads(layer.norm1, affine, sums, projection), conv1_grad, *norm2_grads, conv2_grad]

    def _conv2_backward(
        self, part: slice, bottleneck: Tensor, affine2: Affine, gradient: Tensor | None, outputs: Outputs
    ) -> None:
        """The gradients of these images' bottlenecks and of the last convolution, and the sums of its norm."""
        assert self.layer.conv2 is not None
        spatial.bn_relu_conv_backward(
            self.backend, self.slot_grad[part], bottleneck, affine2.mean, affine2.scale, affine2.shift,
            self.layer.conv2, self.size, self.layer.dilation, gradient, False, *outputs,
        )  # fmt: skip

    def _bottleneck_output(self, part: slice) -> Tensor:
        """[rows, K] of these images, as saved or recomputed; the recomputation takes no statistics."""
        if self.saved_bottleneck is not None:
            return self.saved_bottleneck
        bottleneck = self._scratch_of(part, "bottleneck") if self.room is None else self.room
        affine = self.affine
        self.backend.bn_relu_conv1x1(
            self.inputs[part], affine.scale, affine.shift, self.layer.conv1, bottleneck, None, None
        )
        return bottleneck

    def _bottleneck_grad(self, part: slice) -> Tensor:
        """[rows, K], the place for the gradient of these images' bottlenecks."""
        if not self.keeps_gradient:
            return self._scratch_of(part, "bottleneck_grad")
        return self._scratch("bottleneck_grad", self.rows, self.layer.conv1.shape[0])[part]

    def _scratch_of(self, part: slice, name: str) -> Tensor:
        """[rows, K], the same for every part."""
        last = self.parts[-1]
        return self._scratch(name, last.stop - last.start, self.layer.conv1.shape[0])[: part.stop - part.start]

    def _norm_grads(
        self, norm: Norm, affine: Affine, sums: Sequence[Tensor | None], projection: Projection
    ) -> list[Tensor | None]:
        """The gradients of the norm's weight and bias."""
        sum_grad, sum_grad_x = sums
        if sum_grad is None or sum_grad_x is None:
            return [None, None]
        return [projection.add(norm, affine, sum_grad, sum_grad_x, self.rows), sum_grad]

    def _sums(self, channels: int, needed: bool) -> tuple[Tensor | None, Tensor | None]:
        if not needed:
            return None, None
        sum_grad, sum_grad_x = self.affine.mean.new_empty(2, channels).unbind()
        return sum_grad, sum_grad_x

    def _like(self, weight: Tensor, needed: bool) -> Tensor | None:
        return empty_gradient(weight, self.affine.mean.dtype) if needed else None

    def _scratch(self, name: str, rows: int, channels: int) -> Tensor:
        """One buffer serves every layer of the block."""
        if name not in self.scratch:
            self.scratch[name] = kernels.empty_kept(self.inputs, rows, channels)
        return self.scratch[name]


Outputs = tuple[Tensor | None, ...]  # what a convolution's backward leaves beside the gradient of its input


def _empty_like(outputs: Outputs) -> Outputs:
    return tuple(None if tensor is None else torch.empty_like(tensor) for tensor in outputs)


def _add(outputs: Outputs, others: Outputs) -> None:
    for tensor, other in zip(outputs, others, strict=True):
        if tensor is not None and other is not None:
            tensor.add_(other)


def _of(part: slice, rows: Tensor | None) -> Tensor | None:
    return None if rows is None else rows[part]


def recomputed_parts(images: int, bottleneck_channels: int, storage_channels: int) -> int:
    """In how many parts of the images a backward recomputes the bottlenecks, where it has no room for all at once.

    Where a bottleneck and its gradient take as much memory as the whole storage, as in the first block of the paper's
    networks, they make the peak of a step. All parts but the last are recomputed twice: for the 3x3 convolution's
    gradient, and again when all sums of the second norm are known. On a GPU, where all else is smaller too, the
    gradients are not kept either.
    """
    return max(min(images, MOST_PARTS), 1) if make_peak(bottleneck_channels, storage_channels) else 1


def make_peak(bottleneck_channels: int, storage_channels: int) -> bool:
    """Whether a bottleneck and its gradient take as much memory as the whole storage."""
    return 2 * bottleneck_channels >= storage_channels


def has_room(bottleneck_channels: int, storage_channels: int, done_channels: int, device: torch.device) -> bool:
    """Whether bottlenecks that make the peak all fit where ``done_channels`` of the storage's gradient are done with.

    Not on a GPU: what would not fit there is the gradient of all bottlenecks.
    """
    fit = make_peak(bottleneck_channels, storage_channels) and done_channels >= bottleneck_channels
    return fit and not recomputes_gradients(device)


def keeps_gradients(parts: int, device: torch.device) -> bool:
    """Whether the gradients of all images' bottlenecks are kept, and not those of a part alone."""
    return parts == 1 or not recomputes_gradients(device)


def recomputes_gradients(device: torch.device) -> bool:
    """Whether the gradients of bottlenecks that are recomputed in parts are recomputed with them."""
    return device.type == "cuda"


def _first_needed(layers_needed: list[list[bool]]) -> int:
    """The index of the first layer with a parameter whose gradient is needed; the number of layers if there is none."""
    return next((index for index, needed in enumerate(layers_needed) if any(needed)), len(layers_needed))
