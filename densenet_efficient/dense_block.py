"""The heart: shared storage, shared statistics, recomputation and the backward of a stage.

A stage is a dense block together with the consumer of all its channels, its exit (a transition, FC-DenseNet's
transition down, the head, or nothing).
The whole block lives in ONE channels-last buffer ``storage`` [M, C0 + L*k]: a layer reads the prefix of its input
channels and writes its k new ones into its slot, so concatenation copies nothing. The mathematics is that of Huang et
al. 2017 (arXiv:1608.06993) and Pleiss et al. 2017 (arXiv:1707.06990), plus the deferred projection of
`batch_norm.Projection`.

Functions here know tensors only; modules stand in `modules.py`, the operators seen by autograd in `operators.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import kernels
from .batch_norm import Affine, BatchNorm, Projection
from .kernels import spatial
from .layout import as_images, as_rows, empty_images
from .synchronisation import Synchronisation

TRANSITION, TRANSITION_DOWN, HEAD, NO_EXIT = "transition", "transition down", "head", "none"


class DenseLayer(NamedTuple):
    """One layer: BN-ReLU-conv1x1-BN-ReLU-conv3x3, or BN-ReLU-conv3x3 where the bottleneck's two are None.

    The last convolution may have any odd kernel sizes, in one to three dimensions, and a dilation.
    """

    norm1: BatchNorm  # of C_l channels
    conv1: Tensor  # [K, C_l, 1, 1], or [k, C_l, 3, 3] without a bottleneck
    norm2: BatchNorm | None  # of K channels
    conv2: Tensor | None  # [k, K, 3, 3]
    dilation: int  # of the last convolution
    dropout: Tensor | None  # [M, k], True where an output is kept

    @property
    def growth_rate(self) -> int:
        """k, the channels that this layer adds."""
        return (self.conv1 if self.conv2 is None else self.conv2).shape[0]


@dataclass
class Stage:
    """A dense block and its exit. The exit's norm and 1x1 convolution are None where it has none."""

    layers: list[DenseLayer]
    exit: str
    exit_norm: BatchNorm | None
    exit_conv: Tensor | None
    exit_dropout: Tensor | None  # [M, C'] of a transition down, True where its convolution's output is kept
    drop_rate: float
    synchronisation: Synchronisation | None = None

    @property
    def bottleneck_channels(self) -> int:
        """K, 0 without a bottleneck."""
        first = self.layers[0]
        return 0 if first.conv2 is None else first.conv1.shape[0]

    @property
    def needs_statistics(self) -> bool:
        """Whether any consumer of the storage normalises by the batch's statistics."""
        norms = [layer.norm1 for layer in self.layers] + ([self.exit_norm] if self.exit_norm else [])
        return any(norm.running is None for norm in norms)


class StageOutput(NamedTuple):
    """What a forward leaves; all but ``out`` is kept for the backward."""

    out: Tensor  # [N, C', H // 2, W // 2] of either transition, [N, C] of a head, empty without an exit
    features: Tensor  # [N, C, H, W], or of one or three dimensions; a view of the storage
    statistics: Tensor  # [2, C]: mean and biased variance of every channel of the storage
    bottleneck_statistics: Tensor  # [L, 2, K]
    bottlenecks: list[Tensor]  # L of [M, K], or none where they are recomputed


class StageGradients(NamedTuple):
    """The gradients of a stage; None where not asked for."""

    input: Tensor | None
    layers: list[list[Tensor | None]]  # in the order of the layer's parameters
    exit: list[Tensor | None]


def pooling_window(stage_exit: str, size: spatial.Size) -> spatial.Size:
    """The window of the exit's pooling: 2 along each axis in either transition, the whole image in the head."""
    return size if stage_exit == HEAD else (2,) * len(size)


def forward_stage(stage: Stage, x: Tensor, save_bottlenecks: bool) -> StageOutput:
    """Runs a stage on ``x`` [N, C0, H, W] of any layout, or of one or three dimensions."""
    images, channels, *axes = x.shape
    size = tuple(axes)
    rows = images * math.prod(size)
    backend = kernels.backend_for(x.device)
    total = channels + sum(layer.growth_rate for layer in stage.layers)
    accumulation = kernels.accumulation_dtype(x.dtype)
    storage = x.new_empty(rows, total)
    statistics = x.new_zeros(2, total, dtype=accumulation)
    mean, variance = statistics.unbind()
    with_statistics = stage.needs_statistics
    if with_statistics:
        backend.write_with_statistics(x.flatten(2), storage[:, :channels], mean[:channels], variance[:channels])
        _merge(stage, mean[:channels], variance[:channels])
    else:
        as_images(storage[:, :channels], *size).copy_(x)

    bottleneck_channels = stage.bottleneck_channels
    bottlenecks: list[Tensor] = []
    bottleneck_statistics = x.new_zeros(len(stage.layers), 2, bottleneck_channels, dtype=accumulation)
    for index, layer in enumerate(stage.layers):
        columns = slice(channels, channels + layer.growth_rate)
        inputs, slot = storage[:, :channels], storage[:, columns]
        slot_statistics = (mean[columns], variance[columns]) if with_statistics else (None, None)
        affine = layer.norm1.affine(backend, mean[:channels], variance[:channels])
        weight = layer.conv1
        if layer.norm2 is not None and layer.conv2 is not None:
            # One allocation a layer: the C library hands blocks of this size out again, larger ones it returns.
            if save_bottlenecks or not bottlenecks:
                bottlenecks.append(x.new_empty(rows, bottleneck_channels))
            bottleneck, stats = bottlenecks[-1], bottleneck_statistics[index].unbind()
            wanted = stats if layer.norm2.running is None else (None, None)
            backend.bn_relu_conv1x1(inputs, affine.scale, affine.shift, layer.conv1, bottleneck, *wanted)
            _merge(stage, *wanted)
            inputs, affine, weight = bottleneck, layer.norm2.affine(backend, *stats), layer.conv2
        fused_statistics = slot_statistics if layer.dropout is None else (None, None)
        spatial.bn_relu_conv(
            backend, inputs, affine.scale, affine.shift, weight, size, layer.dilation, slot, *fused_statistics
        )
        if layer.dropout is not None:
            _drop(slot, layer.dropout, stage.drop_rate)
            if with_statistics:
                backend.channel_stats(slot, *slot_statistics)
        _merge(stage, *slot_statistics)
        channels += layer.growth_rate

    out = _forward_exit(stage, storage, statistics, size)
    kept = bottlenecks if save_bottlenecks else []
    return StageOutput(out, as_images(storage, *size), statistics, bottleneck_statistics, kept)


def _merge(stage: Stage, mean: Tensor | None, variance: Tensor | None) -> None:
    """Makes statistics that were just taken those of all processes."""
    if stage.synchronisation is not None and mean is not None and variance is not None:
        stage.synchronisation.merge(mean, variance)


def backward_stage(
    stage: Stage,
    out_grad: Tensor | None,
    features_grad: Tensor | None,
    saved: StageOutput,
    input_needed: bool,
    layers_needed: list[list[bool]],
    exit_needed: list[bool],
) -> StageGradients:
    """The backward of `forward_stage`; of the gradients, only those needed are computed.

    ``saved.out`` is not read. ``layers_needed`` and ``exit_needed`` follow the order of the parameters.
    """
    size = tuple(saved.features.shape[2:])
    storage = as_rows(saved.features)
    total = storage.shape[1]
    mean = saved.statistics[0]
    kernels.return_freed_memory(storage)
    grad = torch.empty_like(storage)  # of the storage; finished where a channel's last consumer is done
    backend = kernels.backend_for(storage.device)
    projection = Projection(backend, total, mean, stage.synchronisation)
    accumulate = features_grad is not None
    if features_grad is not None:
        as_images(grad, *size).copy_(features_grad)
    exit_grads: list[Tensor | None] = [None] * len(exit_needed)
    if out_grad is not None and stage.exit_norm is not None:
        backward_exit = _backward_transition_down if stage.exit == TRANSITION_DOWN else _backward_exit
        exit_grads = backward_exit(stage, out_grad, saved, grad, accumulate, projection, exit_needed)

    layer_grads: list[list[Tensor | None]] = [[None] * len(needed) for needed in layers_needed]
    lowest = 0 if input_needed else _first_needed(layers_needed)
    scratch: dict[str, Tensor] = {}
    stop = total
    for index in range(len(stage.layers) - 1, lowest - 1, -1):
        layer = stage.layers[index]
        start = stop - layer.growth_rate
        projection.apply(grad[:, start:stop], storage[:, start:stop], mean, start, stop)
        if layer.dropout is not None:
            _drop(grad[:, start:stop], layer.dropout, stage.drop_rate)
        below_needed = input_needed or index > lowest
        backward = _LayerBackward(backend, layer, index, saved, storage[:, :start], grad, below_needed, scratch)
        backward.synchronisation = stage.synchronisation
        layer_grads[index] = backward.run(layers_needed[index], projection)
        stop = start
    scratch.clear()  # before the peak of the copy below
    input_grad = None
    if input_needed:
        projection.apply(grad[:, :stop], storage[:, :stop], mean, 0, stop)
        input_grad = as_images(grad[:, :stop].contiguous(), *size)
    return StageGradients(input_grad, layer_grads, exit_grads)


class _LayerBackward:
    """The backward of one layer: from the finished gradient of its slot to the gradient buffer of its inputs."""

    def __init__(
        self,
        backend: ModuleType,
        layer: DenseLayer,
        index: int,
        saved: StageOutput,
        inputs: Tensor,
        grad: Tensor,
        below_needed: bool,
        scratch: dict[str, Tensor],
    ) -> None:
        self.layer = layer
        self.index = index
        self.saved = saved
        self.inputs = inputs  # [M, C_l], the prefix of the storage
        channels = inputs.shape[1]
        self.inputs_grad = grad[:, :channels] if below_needed else None
        self.slot_grad = grad[:, channels : channels + layer.growth_rate]
        self.scratch = scratch
        self.synchronisation: Synchronisation | None = None
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
            self.scratch[name] = self.inputs.new_empty(self.rows, channels)
        return self.scratch[name]


def _forward_exit(stage: Stage, storage: Tensor, statistics: Tensor, size: spatial.Size) -> Tensor:
    """BN-ReLU-average pooling, and the transition's 1x1 convolution, which commutes with the pooling."""
    if stage.exit_norm is None:
        return storage.new_empty(0)
    if stage.exit == TRANSITION_DOWN:
        return F.max_pool2d(as_images(_convolve_down(stage, storage, statistics), *size), 2)
    pooled = _pool(stage, storage, statistics, size)
    if stage.exit_conv is None:
        return pooled
    pooled_size = spatial.pooled_size(size, pooling_window(stage.exit, size))
    images = storage.shape[0] // math.prod(size)
    out = empty_images(storage, images, stage.exit_conv.shape[0], *pooled_size)
    torch.mm(pooled, stage.exit_conv.flatten(1).to(pooled.dtype).t(), out=as_rows(out))
    return out


def _pool(stage: Stage, storage: Tensor, statistics: Tensor, size: spatial.Size) -> Tensor:
    """[M', C], the pooled activations of the exit."""
    assert stage.exit_norm is not None
    backend = kernels.backend_for(storage.device)
    affine = stage.exit_norm.affine(backend, *statistics.unbind())
    window = pooling_window(stage.exit, size)
    windows = storage.shape[0] // math.prod(size) * math.prod(spatial.pooled_size(size, window))
    pooled = storage.new_empty(windows, storage.shape[1])
    spatial.bn_relu_avg_pool(backend, storage, affine.scale, affine.shift, size, window, pooled)
    return pooled


def _backward_exit(
    stage: Stage,
    out_grad: Tensor,
    saved: StageOutput,
    grad: Tensor,
    accumulate: bool,
    projection: Projection,
    needed: list[bool],
) -> list[Tensor | None]:
    """Fills the gradient buffer from the exit's gradient; returns the gradients of (norm, conv)'s parameters."""
    assert stage.exit_norm is not None
    storage = as_rows(saved.features)
    size = tuple(saved.features.shape[2:])
    conv_grad, pooled_grad = None, out_grad
    if stage.exit_conv is not None:
        out_rows = as_rows(out_grad)
        weight = stage.exit_conv.flatten(1).to(out_rows.dtype)
        if needed[2]:
            pooled = _pool(stage, storage, saved.statistics, size)
            conv_grad = (out_rows.t() @ pooled).view_as(stage.exit_conv)
            del pooled
        pooled_grad = out_rows @ weight
    backend = projection.backend
    affine = stage.exit_norm.affine(backend, *saved.statistics.unbind())
    window = pooling_window(stage.exit, size)
    sum_grad, sum_grad_x = torch.empty_like(affine.mean), torch.empty_like(affine.mean)
    spatial.bn_relu_avg_pool_backward(
        backend, pooled_grad.contiguous(), storage, affine.mean, affine.scale, affine.shift,
        size, window, grad, accumulate, sum_grad, sum_grad_x,
    )  # fmt: skip
    norm_grad = projection.add(stage.exit_norm, affine, sum_grad, sum_grad_x, storage.shape[0])
    return [norm_grad, sum_grad, *([conv_grad] if stage.exit_conv is not None else [])]


def _convolve_down(stage: Stage, storage: Tensor, statistics: Tensor) -> Tensor:
    """[M, C'], what a transition down pools: BN-ReLU-1x1 convolution-dropout of every pixel; never saved."""
    assert stage.exit_norm is not None and stage.exit_conv is not None
    backend = kernels.backend_for(storage.device)
    affine = stage.exit_norm.affine(backend, *statistics.unbind())
    out = storage.new_empty(storage.shape[0], stage.exit_conv.shape[0])
    backend.bn_relu_conv1x1(storage, affine.scale, affine.shift, stage.exit_conv, out, None, None)
    if stage.exit_dropout is not None:
        _drop(out, stage.exit_dropout, stage.drop_rate)
    return out


def _backward_transition_down(
    stage: Stage,
    out_grad: Tensor,
    saved: StageOutput,
    grad: Tensor,
    accumulate: bool,
    projection: Projection,
    needed: list[bool],
) -> list[Tensor | None]:
    """As `_backward_exit`; a window's gradient goes to its first maximum, which is found anew."""
    assert stage.exit_norm is not None and stage.exit_conv is not None
    storage = as_rows(saved.features)
    spread = _unpool(as_images(_convolve_down(stage, storage, saved.statistics), *saved.features.shape[2:]), out_grad)
    if stage.exit_dropout is not None:
        _drop(spread, stage.exit_dropout, stage.drop_rate)
    if not accumulate:
        grad.zero_()
    affine = stage.exit_norm.affine(projection.backend, *saved.statistics.unbind())
    sum_grad, sum_grad_x = torch.empty_like(affine.mean), torch.empty_like(affine.mean)
    conv_grad = stage.exit_conv.new_empty(stage.exit_conv.shape, dtype=affine.mean.dtype) if needed[2] else None
    nothing = affine.mean.new_zeros(spread.shape[1])  # no norm follows the convolution
    projection.backend.bn_relu_conv1x1_backward(
        spread, spread, nothing, nothing, nothing,
        storage, affine.mean, affine.scale, affine.shift, stage.exit_conv, grad, conv_grad, sum_grad, sum_grad_x,
    )  # fmt: skip
    return [projection.add(stage.exit_norm, affine, sum_grad, sum_grad_x, storage.shape[0]), sum_grad, conv_grad]


def _unpool(images: Tensor, out_grad: Tensor) -> Tensor:
    """[M, C], the gradient of ``images`` [N, C, H, W] under 2x2 maximum pooling."""
    _, indices = F.max_pool2d(images, 2, return_indices=True)
    window: tuple[list[int], ...] = ([2, 2], [2, 2], [0, 0], [1, 1])
    return as_rows(torch.ops.aten.max_pool2d_with_indices_backward(out_grad, images, *window, False, indices))


def _first_needed(layers_needed: list[list[bool]]) -> int:
    """The index of the first layer with a parameter whose gradient is needed; the number of layers if there is none."""
    return next((index for index, needed in enumerate(layers_needed) if any(needed)), len(layers_needed))


def _drop(rows: Tensor, kept: Tensor, drop_rate: float) -> None:
    """Inverted dropout of ``rows`` [M, k], in place."""
    rows.mul_(kept).mul_(1 / (1 - drop_rate) if drop_rate < 1 else 0)
