"""Inference: what a stage does not change from call to call is prepared once, and its layers run in one native call.

Prepared are the affine maps of its norms (they use their running statistics) and its weights, packed as the kernels
read them; under autocast the classifier's weights, cast. All of it is kept beside the block (and the classifier) for as
long as every module, parameter and buffer is what it was; nothing needs to be converted, and nothing of it is saved or
copied with the model. No batch norm is folded into the weights: the kernels apply its map while they load, one
multiply-add per element.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from . import fusion, kernels
from .dimensions import BatchNorm, Convolution
from .fusion import LayerParts, StageExit
from .input_checks import check_devices, convolved_size
from .kept import beside
from .kernels import spatial
from .layout import as_rows, channels_last
from .readings import read_once
from .stage import HEAD, NO_EXIT, TRANSITION_DOWN, pooling_window
from .stage_arguments import norms_of

if TYPE_CHECKING:
    from ._C import ModuleSnapshot
    from .operator_calls import StageBlock


class Prepared(NamedTuple):
    """What a stage needs for activations of one dtype."""

    affines: list[Tensor]  # per convolution of each layer, [4, C]
    weights: list[Tensor]  # the same, packed
    exit_affine: Tensor | None  # [4, C]
    exit_weight: Tensor | None  # packed


class PreparedStage:
    """A dense block and what consumes it, whose norms all use their running statistics, and what was prepared for it.

    In two dimensions and without dilation.
    """

    def __init__(self, block: nn.Module, layers: list[LayerParts], stage_exit: StageExit) -> None:
        from ._C import ModuleSnapshot  # there, because the native backend is

        self.norms = [norm for layer in layers for norm in layer.norms]
        self.convolutions = [conv for layer in layers for conv in layer.convolutions]
        self.exit = stage_exit
        self.snapshot = ModuleSnapshot([block, stage_exit.consumer], with_values=True)
        last = [] if stage_exit.conv is None else [stage_exit.conv]
        by_dtype: dict[torch.dtype, Tensor] = {}
        for conv in [*self.convolutions, *last]:
            by_dtype.setdefault(conv.weight.dtype, conv.weight)
        self.weights = [*by_dtype.values()]  # the first of each dtype: as much as all of them say of the input's
        first = layers[0]
        self.bottleneck_channels, self.growth_rate = first.channels if first.bottleneck else (0, *first.channels)
        self.total = fusion.channels_behind(layers)
        self.out_channels = 0 if stage_exit.norm is None else self.total
        if stage_exit.conv is not None:
            self.out_channels = stage_exit.conv.out_channels
        self.prepared: dict[torch.dtype, Prepared] = {}

    def run(self, x: Tensor, keep_features: bool) -> tuple[Tensor, Tensor]:
        """The exit's output (empty without one) and the block's features (empty unless kept).

        ``x`` is [N, C0, H, W] of any layout.
        """
        prepared = self.prepared.get(x.dtype)
        if prepared is None:
            prepared = self.prepared[x.dtype] = self._prepare(x)
        images, _, height, width = x.shape
        pools = self.exit.kind not in (NO_EXIT, TRANSITION_DOWN)
        window = pooling_window(self.exit.kind, (height, width)) if pools else (1, 1)
        features = kernels.empty_kept_images(x, images, self.total, height, width) if keep_features else None
        out = kernels.empty_kept_images(x, images, self.out_channels, height // window[0], width // window[1])
        torch.ops.densenet_efficient.dense_stage_inference(
            as_rows(channels_last(x)), height, width, self.bottleneck_channels, self.growth_rate,
            prepared.affines, prepared.weights, prepared.exit_affine, prepared.exit_weight, window,
            None if features is None else as_rows(features), as_rows(out) if self.out_channels else None,
        )  # fmt: skip
        if self.exit.kind == TRANSITION_DOWN:
            out = F.max_pool2d(out, 2)
        elif self.exit.kind == HEAD:
            out = out.flatten(1)
        return out, x.new_empty((0,)) if features is None else features

    def _prepare(self, x: Tensor) -> Prepared:
        dtype, pack = kernels.accumulation_dtype(x.dtype), torch.ops.densenet_efficient.packed_weight
        return Prepared(
            [_affine(norm, dtype) for norm in self.norms],
            [pack(conv.weight, x.dtype) for conv in self.convolutions],
            None if self.exit.norm is None else _affine(self.exit.norm, dtype),
            None if self.exit.conv is None else pack(self.exit.conv.weight, x.dtype),
        )


def applies(x: Tensor) -> bool:
    """Whether a forward of ``x`` is wanted for its values alone, on the native backend.

    That is without a gradient, a tangent, a trace or a hook.
    """
    return (
        not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and forward_ad._current_level < 0  # else any tensor may have a tangent
        and type(x) is Tensor
        and x.device.type == "cpu"
        and torch._C._get_tracing_state() is None
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._functorch.is_functorch_wrapped_tensor(x)
        and kernels.backend_name(x.device) == "cpu"
        and not fusion.any_global_hook()
    )


def kept_stage(block: nn.Module, consumer: nn.Module | None) -> PreparedStage | None:
    """What was prepared and is kept for ``block`` with this consumer, where it is still valid."""
    kept = beside(block)
    stage = kept.stage  # once: another thread may put in that of another consumer
    if stage is None or stage.exit.consumer is not consumer:  # then it stays, for the calls with its own
        return None
    if not stage.snapshot.matches([block, consumer]):
        stage = kept.stage = None
    return stage


def forget_stage(block: nn.Module) -> None:
    """Let go of what is kept for ``block``: a training is about to change its weights.

    It needs no memory then, and FSDP gathers new weights into the same tensors without a new version.
    """
    if not torch.compiler.is_compiling():
        beside(block).stage = None


def prepare_stage(
    block: StageBlock, layers: list[LayerParts], stage_exit: StageExit, x: Tensor
) -> PreparedStage | None:
    """A stage prepared for ``x``, and kept for the next calls.

    None where no kernel serves its layers, where its statistics or weights may not be kept, or where they have changed.
    """
    if not _may_be_kept(layers, stage_exit, x):
        return None
    kept = beside(block)  # before the snapshot is taken
    prepared = PreparedStage(block, layers, stage_exit)
    # Another thread may have changed them since they were read: then the snapshot is not of what was prepared.
    if not _is_as_read(block, layers, stage_exit) or not _may_be_kept(layers, stage_exit, x):
        return None
    kept.stage = prepared
    return prepared


def _may_be_kept(layers: list[LayerParts], stage_exit: StageExit, x: Tensor) -> bool:
    """Whether kernels serve these layers, and what they compute with may be kept for ``x``."""
    if not all(spatial.has_kernel(layer.convolutions[-1].weight, layer.dilation) for layer in layers):
        return False
    norms = norms_of(layers, stage_exit)
    if (layers[0].training and layers[0].drop_rate > 0) or any(map(fusion.uses_batch_statistics, norms)):
        return False
    last = [] if stage_exit.conv is None else [stage_exit.conv]
    modules: list[nn.Module] = [*norms, *(conv for layer in layers for conv in layer.convolutions), *last]
    tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    check_devices(x, tensors)
    # Of those made under torch.inference_mode nothing tells when they change.
    return not any(tensor.is_inference() for tensor in tensors)


def _is_as_read(block: StageBlock, layers: list[LayerParts], stage_exit: StageExit) -> bool:
    """Whether a block, and what runs with it as one operator, still read so; alone it may have hooks of its own."""
    is_whole = stage_exit.consumer is None or not fusion.is_observed(block)
    return is_whole and fusion.is_as_read(stage_exit) and read_once(block) == layers


def run_stem(conv: Convolution, norm: BatchNorm, x: Tensor, dtype: torch.dtype) -> Tensor:
    """The stem's output in ``dtype``, of images [N, C, H, W] of any layout, where its norm uses its running statistics.

    No more of the convolution's output exists at a time than what is pooled next.
    """
    weight, affine = conv.weight.to(dtype), _affine(norm, kernels.accumulation_dtype(dtype))
    size = spatial.max_pooled_size(convolved_size(conv, x))
    out = kernels.empty_kept_images(weight, x.shape[0], conv.out_channels, *size)
    torch.ops.densenet_efficient.conv_bn_relu_max_pool(
        _cast_images(x, weight), weight, conv.stride, [*map(int, conv.padding)], affine[2], affine[3], as_rows(out)
    )
    return out


def _cast_images(x: Tensor, like: Tensor) -> Tensor:
    """Images in the dtype of ``like``; in kept memory, which the first block uses next."""
    if x.dtype == like.dtype:
        return x
    empty = kernels.empty_kept if x.is_contiguous() else kernels.empty_kept_images
    return empty(like, *x.shape).copy_(x)


class CastLinear(NamedTuple):
    """A linear layer's weights in the dtype of an autocast."""

    snapshot: ModuleSnapshot
    weight: Tensor
    bias: Tensor | None


def classify(linear: nn.Module, x: Tensor) -> Tensor:
    """``linear(x)``; without casting its weights anew each time, as autocast does in an inference."""
    if type(linear) is nn.Linear and applies(x) and torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        cast = _kept_cast(linear, dtype) or _cast(linear, dtype)
        if cast is not None:
            return F.linear(x, cast.weight, cast.bias)
    output: Tensor = linear(x)
    return output


def _kept_cast(linear: nn.Linear, dtype: torch.dtype) -> CastLinear | None:
    """What is kept for ``linear`` in this dtype, where it is still valid."""
    cast = beside(linear).cast
    return cast if cast is not None and cast.weight.dtype == dtype and cast.snapshot.matches([linear]) else None


def _cast(linear: nn.Linear, dtype: torch.dtype) -> CastLinear | None:
    """The same made, and kept for the next calls; None where torch would not cast, or weights may not be kept."""
    from ._C import ModuleSnapshot  # there, because the native backend is

    kept = beside(linear)  # before the snapshot is taken
    snapshot = ModuleSnapshot([linear], with_values=True)  # first: another thread may change what is looked at and cast
    tensors = list(linear.parameters())
    if fusion.is_observed(linear) or any(tensor.dtype != torch.float32 or tensor.is_inference() for tensor in tensors):
        return None
    bias = None if linear.bias is None else linear.bias.to(dtype)
    cast = kept.cast = CastLinear(snapshot, linear.weight.to(dtype), bias)
    return cast


def _affine(norm: BatchNorm, dtype: torch.dtype) -> Tensor:
    """[4, C] of a norm that uses its running statistics."""
    assert norm.running_mean is not None and norm.running_var is not None
    affine = norm.weight.new_empty(4, norm.num_features, dtype=dtype)
    kernels.cpu.batch_norm_affine(norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps, affine)
    return affine
