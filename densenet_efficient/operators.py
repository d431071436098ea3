"""The stage and the stem as functional operators: what autograd, torch.compile and export see.

Tensors and plain values go in and out; the writes into slices of a storage happen inside. An operator's fake and its
autograd formula stand beside it. Running statistics are updated outside, once per step, from the returned statistics.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor

from .batch_norm import Norm
from .dense_block import backward_stage, forward_stage
from .kernels import accumulation_dtype, spatial
from .layout import as_images, empty_gradient, empty_images
from .registration import register, register_autograd, register_fake
from .stage import NO_EXIT, Layer, Stage, StageOutput, pooling_window
from .stem import Stem, StemOutput, backward_stem, forward_stem
from .synchronisation import Synchronisation

PARAMETERS_WITH_BOTTLENECK, PARAMETERS_WITHOUT = 6, 3

T = TypeVar("T")


def _without_autocast(device: str) -> AbstractContextManager:
    """Inside an operator the dtypes are settled: autocast of this type of device must not cast once more."""
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def _norm(weight: Tensor, bias: Tensor, epsilons: list[float], uses_running: list[bool], running: list[Tensor]) -> Norm:
    """Takes the next norm off the front of the three lists."""
    pair = (running.pop(0), running.pop(0)) if uses_running.pop(0) else None
    return Norm(weight, bias, epsilons.pop(0), pair)


def _describe_stage(
    parameters: list[Tensor],
    exit_parameters: list[Tensor],
    running: list[Tensor],
    masks: list[Tensor],
    epsilons: list[float],
    uses_running: list[bool],
    bottleneck: bool,
    dilations: list[int],
    stage_exit: str,
    drop_rate: float,
    counts: Tensor | None,
    group: str,
) -> Stage:
    """The stage that the operator's flat arguments describe."""
    lists = (list(epsilons), list(uses_running), list(running))
    layers = []
    for index, own in enumerate(_by_layer(parameters, bottleneck)):
        norm1 = _norm(own[0], own[1], *lists)
        norm2 = _norm(own[3], own[4], *lists) if bottleneck else None
        conv1, conv2 = (_of_plane(own[2]), own[5]) if bottleneck else (own[2], None)
        mask = masks[index] if masks else None
        layers.append(Layer(norm1, conv1, norm2, conv2, dilations[index], mask))
    exit_norm = _norm(exit_parameters[0], exit_parameters[1], *lists) if exit_parameters else None
    exit_conv = exit_parameters[2] if len(exit_parameters) > 2 else None
    exit_dropout = masks[len(layers)] if len(masks) > len(layers) else None
    synchronisation = _synchronisation(counts, group)
    return Stage(layers, stage_exit, exit_norm, exit_conv, exit_dropout, drop_rate, synchronisation)


def _of_plane(weight: Tensor) -> Tensor:
    """A 1x1 convolution's weight of any dimensions as [K, C, 1, 1]."""
    return weight if weight.dim() == 4 else weight.view(*weight.shape[:2], 1, 1)


def _by_layer(values: list[T], bottleneck: bool) -> list[list[T]]:
    size = PARAMETERS_WITH_BOTTLENECK if bottleneck else PARAMETERS_WITHOUT
    return [list(values[start : start + size]) for start in range(0, len(values), size)]


def compute_stage(
    x: Tensor,
    parameters: list[Tensor],
    exit_parameters: list[Tensor],
    running: list[Tensor],
    masks: list[Tensor],
    epsilons: list[float],
    uses_running: list[bool],
    bottleneck: bool,
    dilations: list[int],
    stage_exit: str,
    drop_rate: float,
    saved_bottlenecks: int,
    counts: Tensor | None,
    group: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    """A dense block and its exit; the outputs are those of `stage.StageOutput`.

    Args:
        x: [N, C0, H, W], or of one or three dimensions, any layout.
        parameters: per layer norm1.weight, norm1.bias, conv1.weight; with a bottleneck the same of norm2 and conv2.
        exit_parameters: norm.weight, norm.bias of the exit, and the convolution's weight in a transition; or nothing.
        running: mean and variance of each norm that uses its running statistics, in the order of the norms.
        masks: per layer [N*H*W, k], bool, what the dropout keeps, then [N*H*W, C'] of a transition down; or nothing.
        epsilons, uses_running: one per norm: the layers' in order, then the exit's.
        dilations: one per layer, of its last convolution.
        stage_exit: "transition", "transition down", "head" or "none".
        saved_bottlenecks: of how many layers, the last ones, the backward finds the bottleneck output saved; it
            recomputes those of the others.
        counts, group: those of a `Synchronisation`; None and empty for a process by itself.
    """
    stage = _describe_stage(
        parameters, exit_parameters, running, masks, epsilons, uses_running, bottleneck, dilations, stage_exit,
        drop_rate, counts, group,
    )  # fmt: skip
    with _without_autocast(x.device.type):
        return forward_stage(stage, x, saved_bottlenecks)


dense_stage = register("dense_stage", compute_stage)


def _fake_stage(
    x: Tensor,
    parameters: list[Tensor],
    exit_parameters: list[Tensor],
    running: list[Tensor],
    masks: list[Tensor],
    epsilons: list[float],
    uses_running: list[bool],
    bottleneck: bool,
    dilations: list[int],
    stage_exit: str,
    drop_rate: float,
    saved_bottlenecks: int,
    counts: Tensor | None,
    group: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    images, channels, *size = x.shape
    layers = _by_layer(parameters, bottleneck)
    total = channels + sum(layer[-1].shape[0] for layer in layers)
    rows = images * math.prod(size)
    dtype = accumulation_dtype(x.dtype)
    features = as_images(x.new_empty(rows, total), *size)
    if stage_exit == NO_EXIT:
        out = x.new_empty((0,))
    elif len(exit_parameters) > 2:  # with a convolution
        pooled = spatial.pooled_size(tuple(size), pooling_window(stage_exit, tuple(size)))
        out = empty_images(x, images, exit_parameters[2].shape[0], *pooled)
    else:
        out = x.new_empty(images, total)
    bottleneck_channels = layers[0][2].shape[0] if bottleneck else 0
    saved = [x.new_empty(rows, bottleneck_channels) for _ in range(saved_bottlenecks if bottleneck else 0)]
    statistics = x.new_empty(2, total, dtype=dtype)
    return out, features, statistics, x.new_empty(len(layers), 2, bottleneck_channels, dtype=dtype), saved


register_fake(dense_stage, _fake_stage)


def compute_stage_backward(
    out_grad: Tensor | None,
    features_grad: Tensor | None,
    features: Tensor,
    statistics: Tensor,
    bottleneck_statistics: Tensor,
    bottlenecks: list[Tensor],
    parameters: list[Tensor],
    exit_parameters: list[Tensor],
    running: list[Tensor],
    masks: list[Tensor],
    epsilons: list[float],
    uses_running: list[bool],
    bottleneck: bool,
    dilations: list[int],
    stage_exit: str,
    drop_rate: float,
    needed: list[bool],
    counts: Tensor | None,
    group: str,
) -> list[Tensor]:
    """The gradients of (x, *parameters, *exit_parameters) for which ``needed`` is true, in this order."""
    stage = _describe_stage(
        parameters, exit_parameters, running, masks, epsilons, uses_running, bottleneck, dilations, stage_exit,
        drop_rate, counts, group,
    )  # fmt: skip
    saved = StageOutput(features.new_empty((0,)), features, statistics, bottleneck_statistics, bottlenecks)
    count = 1 + len(parameters)
    layers_needed = _by_layer(needed[1:count], bottleneck)
    with _without_autocast(features.device.type):
        gradients = backward_stage(stage, out_grad, features_grad, saved, needed[0], layers_needed, needed[count:])
    values = [gradients.input, *(grad for layer in gradients.layers for grad in layer), *gradients.exit]
    x = features[:, : stage.input_channels]
    return _needed_gradients(values, [x, *parameters, *exit_parameters], needed)


def _needed_gradients(grads: list[Tensor | None], parameters: list[Tensor], needed: list[bool]) -> list[Tensor]:
    """Those needed, each in its parameter's dtype and shape; zeros for a parameter that no gradient reached."""
    return [
        parameter.new_zeros(parameter.shape) if grad is None else _like(parameter, grad)
        for grad, parameter, wanted in zip(grads, parameters, needed, strict=True)
        if wanted
    ]


def _like(parameter: Tensor, grad: Tensor) -> Tensor:
    """A conversion or a view of itself takes time too, for hundreds of parameters."""
    if grad.dtype != parameter.dtype:
        grad = grad.to(parameter.dtype)
    return grad if grad.shape == parameter.shape else grad.view(parameter.shape)


dense_stage_backward = register("dense_stage_backward", compute_stage_backward)


def _fake_stage_backward(
    out_grad: Tensor | None,
    features_grad: Tensor | None,
    features: Tensor,
    statistics: Tensor,
    bottleneck_statistics: Tensor,
    bottlenecks: list[Tensor],
    parameters: list[Tensor],
    exit_parameters: list[Tensor],
    running: list[Tensor],
    masks: list[Tensor],
    epsilons: list[float],
    uses_running: list[bool],
    bottleneck: bool,
    dilations: list[int],
    stage_exit: str,
    drop_rate: float,
    needed: list[bool],
    counts: Tensor | None,
    group: str,
) -> list[Tensor]:
    images, _, *size = features.shape
    x = as_images(features.new_empty(images * math.prod(size), parameters[0].shape[0]), *size)
    gradients = [x, *(empty_gradient(parameter, parameter.dtype) for parameter in [*parameters, *exit_parameters])]
    return [gradient for gradient, wanted in zip(gradients, needed, strict=True) if wanted]


register_fake(dense_stage_backward, _fake_stage_backward)


def _as_they_are(running: list[Tensor]) -> list[Tensor]:
    """Copies of running statistics: a forward in training may update them before this one's backward."""
    return [statistic.clone() for statistic in running]


def _save_stage(ctx: Any, inputs: Sequence[Any], output: tuple[Any, ...]) -> None:
    _, parameters, exit_parameters, running, masks, *values, _, counts, group = inputs
    _, features, statistics, bottleneck_statistics, bottlenecks = output
    groups = (bottlenecks, parameters, exit_parameters, _as_they_are(running), masks)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(statistics, bottleneck_statistics, *bottlenecks)
    ctx.lengths = [len(group) for group in groups]
    ctx.values, ctx.counts, ctx.group = values, counts, group
    ctx.save_for_backward(
        features, statistics, bottleneck_statistics, *(tensor for tensors in groups for tensor in tensors)
    )


def _backward_stage(
    ctx: Any, inputs_needed: Sequence[Any], out_grad: Tensor | None, features_grad: Tensor | None, *_: Any
) -> Sequence[Any]:
    nothing = [None] * (len(inputs_needed) - 3)
    if out_grad is None and features_grad is None:
        return None, None, None, *nothing
    tensors = ctx.saved_tensors  # which unpacks them all, each time
    saved, groups = tensors[:3], _split(tensors[3:], ctx.lengths)
    input_needed, parameters_needed, exit_needed, *_rest = inputs_needed
    # An exit whose output nobody used gets none, as from torch; zeros would let an optimizer decay its weights.
    needed = [input_needed, *parameters_needed, *(wanted and out_grad is not None for wanted in exit_needed)]
    gradients = iter(
        dense_stage_backward(out_grad, features_grad, *saved, *groups, *ctx.values, needed, ctx.counts, ctx.group)
    )
    spread = [next(gradients) if wanted else None for wanted in needed]
    stop = 1 + len(parameters_needed)
    return spread[0], spread[1:stop], spread[stop:], *nothing


def _split(values: Any, lengths: list[int]) -> list[list[Tensor]]:
    remaining = iter(values)
    return [[next(remaining) for _ in range(length)] for length in lengths]


register_autograd(dense_stage, compute_stage, _save_stage, _backward_stage)


def compute_stem(
    x: Tensor,
    conv: Tensor,
    weight: Tensor,
    bias: Tensor,
    running: list[Tensor],
    stride: list[int],
    padding: list[int],
    epsilon: float,
    save_conv: bool,
    counts: Tensor | None,
    group: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Convolution, BN, ReLU and 3x3 maximum pooling; the outputs are those of `stem.StemOutput`.

    ``running`` is (mean, variance) where the norm uses its running statistics, else empty.
    """
    description = _describe_stem(conv, weight, bias, running, stride, padding, epsilon, counts, group)
    with _without_autocast(x.device.type):
        return forward_stem(description, x, save_conv)


stem = register("stem", compute_stem)


def _describe_stem(
    conv: Tensor,
    weight: Tensor,
    bias: Tensor,
    running: list[Tensor],
    stride: list[int],
    padding: list[int],
    epsilon: float,
    counts: Tensor | None,
    group: str,
) -> Stem:
    pair = (running[0], running[1]) if running else None
    return Stem(conv, stride, padding, Norm(weight, bias, epsilon, pair), _synchronisation(counts, group))


def _synchronisation(counts: Tensor | None, group: str) -> Synchronisation | None:
    return None if counts is None else Synchronisation(counts, group)


def _fake_stem(
    x: Tensor,
    conv: Tensor,
    weight: Tensor,
    bias: Tensor,
    running: list[Tensor],
    stride: list[int],
    padding: list[int],
    epsilon: float,
    save_conv: bool,
    counts: Tensor | None,
    group: str,
) -> tuple[Tensor, Tensor, Tensor]:
    images, channels = x.shape[0], conv.shape[0]
    size = _describe_stem(conv, weight, bias, running, stride, padding, epsilon, counts, group).output_size(x.shape[2:])
    out = empty_images(x, images, channels, *spatial.max_pooled_size(size))
    statistics = x.new_empty(2, channels, dtype=accumulation_dtype(x.dtype))
    conv_out = empty_images(x, images, channels, *size) if save_conv else x.new_empty((0,))
    return out, statistics, conv_out


register_fake(stem, _fake_stem)


def compute_stem_backward(
    out_grad: Tensor,
    x: Tensor,
    statistics: Tensor,
    conv_out: Tensor,
    conv: Tensor,
    weight: Tensor,
    bias: Tensor,
    running: list[Tensor],
    stride: list[int],
    padding: list[int],
    epsilon: float,
    needed: list[bool],
    counts: Tensor | None,
    group: str,
) -> list[Tensor]:
    """The gradients of (x, conv, weight, bias) for which ``needed`` is true, in this order."""
    description = _describe_stem(conv, weight, bias, running, stride, padding, epsilon, counts, group)
    with _without_autocast(x.device.type):
        gradients = backward_stem(description, out_grad, x, StemOutput(out_grad, statistics, conv_out), needed)
    return _needed_gradients(gradients, [x, conv, weight, bias], needed)


stem_backward = register("stem_backward", compute_stem_backward)


def _fake_stem_backward(
    out_grad: Tensor,
    x: Tensor,
    statistics: Tensor,
    conv_out: Tensor,
    conv: Tensor,
    weight: Tensor,
    bias: Tensor,
    running: list[Tensor],
    stride: list[int],
    padding: list[int],
    epsilon: float,
    needed: list[bool],
    counts: Tensor | None,
    group: str,
) -> list[Tensor]:
    gradients = [empty_images(x, *x.shape)]
    gradients += [parameter.new_empty(parameter.shape) for parameter in (conv, weight, bias)]
    return [gradient for gradient, want in zip(gradients, needed, strict=True) if want]


register_fake(stem_backward, _fake_stem_backward)


def _save_stem(ctx: Any, inputs: Sequence[Any], output: tuple[Tensor, ...]) -> None:
    x, conv, weight, bias, running, *values, _, counts, group = inputs
    _, statistics, conv_out = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(statistics, conv_out)
    ctx.values, ctx.counts, ctx.group = values, counts, group
    ctx.save_for_backward(x, statistics, conv_out, conv, weight, bias, *_as_they_are(running))


def _backward_stem(ctx: Any, inputs_needed: Sequence[Any], out_grad: Tensor | None, *_: Any) -> Sequence[Any]:
    nothing = [None] * (len(inputs_needed) - 4)
    if out_grad is None:
        return None, None, None, None, *nothing
    x, statistics, conv_out, conv, weight, bias, *running = ctx.saved_tensors
    needed = inputs_needed[:4]
    saved = (x, statistics, conv_out, conv, weight, bias, running)
    gradients = iter(stem_backward(out_grad, *saved, *ctx.values, needed, ctx.counts, ctx.group))
    return *(next(gradients) if want else None for want in needed), *nothing


register_autograd(stem, compute_stem, _save_stem, _backward_stem)


def _save_nothing(ctx: Any, inputs: Sequence[Any], output: Any) -> None:
    """A second derivative is refused, so nothing is kept for it."""


def _refuse_double_backward(ctx: Any, needed: Sequence[Any], *grads: Any) -> Any:
    raise RuntimeError(
        "densenet_efficient has no second derivative (double backward); "
        "for it, use densenet_efficient.reference.NaiveDenseNet with the same state_dict"
    )


register_autograd(dense_stage_backward, compute_stage_backward, _save_nothing, _refuse_double_backward)
register_autograd(stem_backward, compute_stem_backward, _save_nothing, _refuse_double_backward)
