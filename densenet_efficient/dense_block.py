"""The heart: shared storage, shared statistics, recomputation and the backward of a stage.

The whole block lives in ONE channels-last buffer ``storage`` [M, C0 + L*k]: a layer reads the prefix of its input
channels and writes its k new ones into its slot, so concatenation copies nothing. The mathematics is that of Huang et
al. 2017 (arXiv:1608.06993) and Pleiss et al. 2017 (arXiv:1707.06990), plus the deferred projection of
`batch_norm.Projection`.

Functions here know tensors only. What a stage is stands in `stage.py`, the loop over its layers in `dense_layers.py`,
modules in `modules.py`, the operators seen by autograd in `operators.py`.
"""

from __future__ import annotations

import math
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from . import dense_layers, kernels, native_layers, products, taped_layers
from .batch_norm import Projection
from .dropout import drop
from .kernels import spatial
from .layout import as_images, as_rows
from .stage import TRANSITION_DOWN, Stage, StageGradients, StageOutput, pooling_window


def forward_stage(stage: Stage, x: Tensor, saved_bottlenecks: int) -> StageOutput:
    """Runs a stage on ``x`` [N, C0, H, W] of any layout, or of one or three dimensions.

    The bottleneck outputs of its last ``saved_bottlenecks`` layers are kept for the backward.
    """
    images, channels, *axes = x.shape
    size = tuple(axes)
    rows = images * math.prod(size)
    backend = kernels.backend_for(x.device)
    total = channels + sum(layer.growth_rate for layer in stage.layers)
    accumulation = kernels.accumulation_dtype(x.dtype)
    storage = kernels.empty_kept(x, rows, total)
    statistics = x.new_zeros(2, total, dtype=accumulation)
    mean, variance = statistics.unbind()
    with_statistics = stage.needs_statistics
    if with_statistics:
        backend.write_with_statistics(x.flatten(2), storage[:, :channels], mean[:channels], variance[:channels])
        stage.merge(mean[:channels], variance[:channels])
    else:
        as_images(storage[:, :channels], *size).copy_(x)

    bottleneck_statistics = x.new_zeros(len(stage.layers), 2, stage.bottleneck_channels, dtype=accumulation)
    bottlenecks = _layer_loop(stage, backend, x).forward_layers(
        _prepared(stage, x), backend, storage, size, statistics, bottleneck_statistics, saved_bottlenecks
    )
    out = _forward_exit(stage, storage, statistics, size)
    return StageOutput(out, as_images(storage, *size), statistics, bottleneck_statistics, bottlenecks)


def _layer_loop(stage: Stage, backend: ModuleType, x: Tensor) -> ModuleType:
    """The module whose loop runs the layers of ``stage``, for activations like ``x``."""
    return next((loop for loop in (native_layers, taped_layers) if loop.can_run(stage, backend, x)), dense_layers)


def _prepared(stage: Stage, x: Tensor) -> Stage:
    """On a GPU with its weights cast for all layers at once: one by one, launching the casts takes longer than they."""
    return stage.in_dtype(x.dtype) if x.device.type == "cuda" else stage


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
    # Of the storage; finished where a channel's last consumer is done.
    grad = kernels.empty_kept(storage, *storage.shape)
    backend = kernels.backend_for(storage.device)
    projection = Projection(backend, storage.shape[1], saved.statistics[0], stage.synchronisation)
    accumulate = features_grad is not None
    if features_grad is not None:
        as_images(grad, *size).copy_(features_grad)
    exit_grads: list[Tensor | None] = [None] * len(exit_needed)
    if out_grad is not None and stage.exit_norm is not None:
        backward_exit = _backward_transition_down if stage.exit == TRANSITION_DOWN else _backward_exit
        exit_grads = backward_exit(stage, out_grad, saved, grad, accumulate, projection, exit_needed)

    layer_grads = _layer_loop(stage, backend, storage).backward_layers(
        _prepared(stage, storage), saved, grad, projection, input_needed, layers_needed
    )
    input_grad = None
    if input_needed:
        input_grad = kernels.empty_kept_images(grad, saved.features.shape[0], stage.input_channels, *size)
        as_rows(input_grad).copy_(grad[:, : stage.input_channels])
    return StageGradients(input_grad, layer_grads, exit_grads)


def _forward_exit(stage: Stage, storage: Tensor, statistics: Tensor, size: spatial.Size) -> Tensor:
    """BN-ReLU-average pooling, and the transition's 1x1 convolution, which commutes with the pooling."""
    if stage.exit_norm is None:
        return storage.new_empty((0,))
    if stage.exit == TRANSITION_DOWN:
        return F.max_pool2d(as_images(_convolve_down(stage, storage, statistics), *size), 2)
    pooled = _pool(stage, storage, statistics, size)
    if stage.exit_conv is None:
        return pooled
    pooled_size = spatial.pooled_size(size, pooling_window(stage.exit, size))
    images = storage.shape[0] // math.prod(size)
    out = kernels.empty_kept_images(storage, images, stage.exit_conv.shape[0], *pooled_size)
    _convolve_pooled(stage.exit_conv, pooled, as_rows(out))
    return out


def _has_native_products(x: Tensor) -> bool:
    """Whether the kernels of the CPU multiply faster than torch, whose library may have none for this CPU's vectors."""
    return kernels.backend_for(x.device) is kernels.cpu and x.dtype == torch.float32


def _identity(channels: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and shift of a norm that changes nothing; as no pooled activation is negative, its ReLU does not either."""
    return like.new_ones(channels), like.new_zeros(channels)


def _convolve_pooled(weight: Tensor, pooled: Tensor, out: Tensor) -> None:
    """The exit's 1x1 convolution, from [M', C] to [M', C']."""
    if _has_native_products(pooled):
        scale, shift = _identity(pooled.shape[1], pooled)
        kernels.cpu.bn_relu_conv1x1(pooled, scale, shift, weight.flatten(1)[:, :, None, None], out, None, None)
    else:
        products.multiply(pooled, weight.flatten(1).to(pooled.dtype).t(), out)


def _convolve_pooled_backward(
    weight: Tensor, pooled: Tensor, out_grad: Tensor, weight_needed: bool
) -> tuple[Tensor, Tensor | None]:
    """The gradients of ``pooled``, which must be right only where it is not zero, and of ``weight``."""
    pooled_grad = kernels.empty_kept(pooled, *pooled.shape)
    if not _has_native_products(pooled):
        products.multiply(out_grad, weight.flatten(1).to(out_grad.dtype), pooled_grad)
        if not weight_needed:
            return pooled_grad, None
        return pooled_grad, _as_pointwise(products.multiply_transposed(out_grad, pooled), weight)
    plane = weight.flatten(1)[:, :, None, None]
    weight_grad = pooled.new_empty(plane.shape) if weight_needed else None
    scale, shift = _identity(pooled.shape[1], pooled)
    nothing = pooled.new_zeros(out_grad.shape[1])  # no norm follows the convolution
    kernels.cpu.bn_relu_conv1x1_backward(
        out_grad, out_grad, nothing, nothing, nothing,
        pooled, shift, scale, shift, plane, pooled_grad.zero_(), weight_grad, *pooled.new_empty(2, *scale.shape),
    )  # fmt: skip
    return pooled_grad, None if weight_grad is None else _as_pointwise(weight_grad, weight)


def _as_pointwise(grad: Tensor, weight: Tensor) -> Tensor:
    """[K, C] numbers as the gradient of a 1x1 convolution's weight, of its own strides where these are of rows.

    Contiguous and channels-last are then the same but for the strides of axes of one, which DDP compares and warns of.
    """
    is_rows = weight.flatten(1).is_contiguous()
    return grad.as_strided(weight.shape, weight.stride()) if is_rows else grad.view_as(weight)


def _pool(stage: Stage, storage: Tensor, statistics: Tensor, size: spatial.Size) -> Tensor:
    """[M', C], the pooled activations of the exit."""
    assert stage.exit_norm is not None
    backend = kernels.backend_for(storage.device)
    affine = stage.exit_norm.affine(backend, *statistics.unbind())
    window = pooling_window(stage.exit, size)
    windows = storage.shape[0] // math.prod(size) * math.prod(spatial.pooled_size(size, window))
    pooled = kernels.empty_kept(storage, windows, storage.shape[1])
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
        pooled = _pool(stage, storage, saved.statistics, size)
        pooled_grad, conv_grad = _convolve_pooled_backward(stage.exit_conv, pooled, as_rows(out_grad), needed[2])
        del pooled
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
    out = kernels.empty_kept(storage, storage.shape[0], stage.exit_conv.shape[0])
    backend.bn_relu_conv1x1(storage, affine.scale, affine.shift, stage.exit_conv, out, None, None)
    if stage.exit_dropout is not None:
        drop(out, stage.exit_dropout, stage.drop_rate)
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
        drop(spread, stage.exit_dropout, stage.drop_rate)
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
    norm_grad = projection.add(stage.exit_norm, affine, sum_grad, sum_grad_x, storage.shape[0])
    return [norm_grad, sum_grad, None if conv_grad is None else _as_pointwise(conv_grad, stage.exit_conv)]


def _unpool(images: Tensor, out_grad: Tensor) -> Tensor:
    """[M, C], the gradient of ``images`` [N, C, H, W] under 2x2 maximum pooling."""
    _, indices = F.max_pool2d(images, 2, return_indices=True)
    window: tuple[list[int], ...] = ([2, 2], [2, 2], [0, 0], [1, 1])
    return as_rows(torch.ops.aten.max_pool2d_with_indices_backward(out_grad, images, *window, False, indices))
