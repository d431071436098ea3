"""The loop over the layers of a dense block, over any backend; `native_layers` is the same loop in C++ for the CPU's.

A layer reads the prefix of its input channels and writes its k new ones into its slot. In the backward it takes the
finished gradient of its slot to the gradient of its inputs.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from . import kernels
from .batch_norm import Affine, BatchNorm, Projection
from .kernels import spatial
from .layout import as_rows
from .stage import Stage, StageOutput


def forward_layers(
    stage: Stage,
    storage: Tensor,
    size: spatial.Size,
    statistics: Tensor,
    bottleneck_statistics: Tensor,
    save_bottlenecks: bool,
) -> list[Tensor]:
    """Fills the slots of ``storage`` [M, C] behind the block's input, and the statistics of what was computed.

    Returns the bottleneck outputs [M, K], none where they are not saved.
    """
    backend = kernels.backend_for(storage.device)
    mean, variance = statistics.unbind()
    with_statistics = stage.needs_statistics
    bottlenecks: list[Tensor] = []
    channels = stage.input_channels(storage)
    for index, layer in enumerate(stage.layers):
        columns = slice(channels, channels + layer.growth_rate)
        inputs, slot = storage[:, :channels], storage[:, columns]
        slot_statistics = (mean[columns], variance[columns]) if with_statistics else (None, None)
        affine = layer.norm1.affine(backend, mean[:channels], variance[:channels])
        weight = layer.conv1
        if layer.norm2 is not None and layer.conv2 is not None:
            if save_bottlenecks or not bottlenecks:
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
    return bottlenecks if save_bottlenecks else []


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
        self.inputs = inputs  # [M, C_l], the prefix of the storage
        channels = inputs.shape[1]
        self.inputs_grad = grad[:, :channels] if below_needed else None
        self.slot_grad = grad[:, channels : channels + layer.growth_rate]
        self.scratch = scratch
        self.rows = inputs.shape[0]
        self.size = tuple(saved.features.shape[2:])
        self.backend = backend
        mean, variance = saved.statistics.unbind()
        self.affine = layer.norm1.affine(self.backend, mean[:channels], variance[:channels])

    def run(self, needed: list[bool], projection: Projection) -> list[Tensor | None]:
        """The gradients of the layer's parameters, None where not needed."""
        if self.layer.conv2 is None:
            return self._plain(needed, projection)
        return self._bottleneck(needed, projection)

    def _plain(self, needed: list[bool], projection: Projection) -> list[Tensor | None]:
        weight, bias, conv = needed
        sums = self._sums(self.inputs, weight or bias or self.inputs_grad is not None)
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
        bottleneck = self._bottleneck_output()
        affine2 = layer.norm2.affine(self.backend, *self.saved.bottleneck_statistics[self.index].unbind())
        sums2 = self._sums(bottleneck, bottleneck_needed or weight2 or bias2)
        bottleneck_grad = self._scratch("bottleneck_grad", bottleneck.shape[1]) if bottleneck_needed else None
        conv2_grad = self._like(layer.conv2, conv2)
        spatial.bn_relu_conv_backward(
            self.backend, self.slot_grad, bottleneck, affine2.mean, affine2.scale, affine2.shift, layer.conv2,
            self.size, layer.dilation, bottleneck_grad, False, conv2_grad, *sums2,
        )  # fmt: skip
        finish = Projection(self.backend, bottleneck.shape[1], affine2.mean, self.synchronisation)
        norm2_grads = self._norm_grads(layer.norm2, affine2, sums2, finish)
        finish.synchronise(slice(None))
        if bottleneck_grad is None:
            return [None, None, None, *norm2_grads, conv2_grad]

        sums = self._sums(self.inputs, norm1_needed)
        conv1_grad = self._like(layer.conv1, conv1)
        self.backend.bn_relu_conv1x1_backward(
            bottleneck_grad, bottleneck, affine2.mean, finish.slope, finish.offset,
            self.inputs, affine.mean, affine.scale, affine.shift, layer.conv1, self.inputs_grad, conv1_grad, *sums,
        )  # fmt: skip
        return [*self._norm_grads(layer.norm1, affine, sums, projection), conv1_grad, *norm2_grads, conv2_grad]

    def _bottleneck_output(self) -> Tensor:
        """[M, K], as saved or recomputed; the recomputation takes no statistics."""
        if self.saved.bottlenecks:
            return self.saved.bottlenecks[self.index]
        bottleneck = self._scratch("bottleneck", self.layer.conv1.shape[0])
        affine = self.affine
        self.backend.bn_relu_conv1x1(self.inputs, affine.scale, affine.shift, self.layer.conv1, bottleneck, None, None)
        return bottleneck

    def _norm_grads(
        self, norm: BatchNorm, affine: Affine, sums: tuple[Tensor | None, Tensor | None], projection: Projection
    ) -> list[Tensor | None]:
        """The gradients of the norm's weight and bias."""
        sum_grad, sum_grad_x = sums
        if sum_grad is None or sum_grad_x is None:
            return [None, None]
        return [projection.add(norm, affine, sum_grad, sum_grad_x, self.rows), sum_grad]

    def _sums(self, x: Tensor, needed: bool) -> tuple[Tensor | None, Tensor | None]:
        if not needed:
            return None, None
        sum_grad, sum_grad_x = self.affine.mean.new_empty(2, x.shape[1]).unbind()
        return sum_grad, sum_grad_x

    def _like(self, weight: Tensor, needed: bool) -> Tensor | None:
        return torch.empty_like(weight, dtype=self.affine.mean.dtype) if needed else None

    def _scratch(self, name: str, channels: int) -> Tensor:
        """[M, channels]; one buffer serves every layer of the block."""
        if name not in self.scratch:
            self.scratch[name] = kernels.empty_kept(self.inputs, self.rows, channels)
        return self.scratch[name]


def _first_needed(layers_needed: list[list[bool]]) -> int:
    """The index of the first layer with a parameter whose gradient is needed; the number of layers if there is none."""
    return next((index for index, needed in enumerate(layers_needed) if any(needed)), len(layers_needed))


def drop(rows: Tensor, kept: Tensor, drop_rate: float) -> None:
    """Inverted dropout of ``rows`` [M, k], in place."""
    rows.mul_(kept).mul_(1 / (1 - drop_rate) if drop_rate < 1 else 0)
