"""Inference: what a stage does not change from call to call is prepared once, and its layers run in one native call.

Prepared are the affine maps of its norms (they use their running statistics) and its weights, packed as the kernels
read them. All of it is kept beside the block for as long as every parameter and buffer is what it was; nothing needs
to be converted, and nothing of it is saved or copied with the model. No batch norm is folded into the weights: the
kernels apply its map while they load, one multiply-add per element.
"""

from __future__ import annotations

from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import fusion, kernels
from .dimensions import BatchNorm, Convolution
from .layout import as_rows, empty_images
from .stage import HEAD, NO_EXIT, TRANSITION_DOWN, pooling_window


class Source(NamedTuple):
    """A parameter or buffer that a plan was made of."""

    owner: dict[str, Any]  # the module's parameters or buffers by name
    name: str
    tensor: Tensor
    version: int
    address: int

    def is_unchanged(self) -> bool:
        """Whether it is still this tensor with the same values; in-place changes raise its version."""
        return (
            self.owner.get(self.name) is self.tensor
            and self.tensor._version == self.version
            and self.tensor.data_ptr() == self.address
        )


class Prepared(NamedTuple):
    """What a stage needs for activations of one dtype."""

    affines: list[Tensor]  # per convolution of each layer, [4, C]
    weights: list[Tensor]  # the same, packed
    exit_affine: Tensor | None  # [4, C]
    exit_weight: Tensor | None  # packed


class Stage(NamedTuple):
    """The modules of a stage: a dense block and what consumes it, in two dimensions and without dilation."""

    block: nn.Module
    consumer: nn.Module | None
    norms: list[BatchNorm]  # of the layers, in order
    convolutions: list[Convolution]  # likewise
    exit: str
    exit_norm: BatchNorm | None
    exit_conv: Convolution | None

    @property
    def every_norm(self) -> list[BatchNorm]:
        return self.norms if self.exit_norm is None else [*self.norms, self.exit_norm]

    @property
    def every_convolution(self) -> list[Convolution]:
        return self.convolutions if self.exit_conv is None else [*self.convolutions, self.exit_conv]


class Plan:
    """A stage whose norms all use their running statistics, and what was prepared for it."""

    def __init__(self, stage: Stage) -> None:
        self.norms, self.convolutions = stage.norms, stage.convolutions
        self.exit, self.exit_norm, self.exit_conv = stage.exit, stage.exit_norm, stage.exit_conv
        self.consumer, self.every_norm = stage.consumer, stage.every_norm
        self.weight = stage.convolutions[0].weight
        has_bottleneck = self.convolutions[0].kernel_size == (1, 1)
        self.bottleneck_channels = self.convolutions[0].out_channels if has_bottleneck else 0
        layers = len(self.convolutions) // (2 if has_bottleneck else 1)
        self.growth_rate = self.convolutions[-1].out_channels
        self.total = self.norms[0].num_features + layers * self.growth_rate
        self.out_channels = 0 if self.exit_norm is None else self.total
        if self.exit_conv is not None:
            self.out_channels = self.exit_conv.out_channels
        parents = [*stage.block.modules(), *(stage.consumer.modules() if stage.consumer else [])]
        self.children = [
            (parent._modules, name, child) for parent in parents for name, child in parent._modules.items()
        ]
        self.sources = [
            Source(owner, name, tensor, tensor._version, tensor.data_ptr())
            for owner, name, tensor in _tensors_of(stage)
        ]
        self.epsilons = [norm.eps for norm in self.every_norm]
        self.prepared: dict[torch.dtype, Prepared] = {}

    def is_valid(self, consumer: nn.Module | None) -> bool:
        """Whether the stage, with this consumer, is still what the plan was made of."""
        return (
            consumer is self.consumer
            and not any(norm.training for norm in self.every_norm)
            and [norm.eps for norm in self.every_norm] == self.epsilons
            and all(owner.get(name) is child for owner, name, child in self.children)
            and all(source.is_unchanged() for source in self.sources)
        )

    def run(self, x: Tensor, keep_features: bool) -> tuple[Tensor, Tensor]:
        """The exit's output (empty without one) and the block's features (empty unless kept).

        ``x`` is [N, C0, H, W] of any layout.
        """
        prepared = self.prepared.get(x.dtype)
        if prepared is None:
            prepared = self.prepared[x.dtype] = self._prepare(x)
        images, _, height, width = x.shape
        pools = self.exit not in (NO_EXIT, TRANSITION_DOWN)
        window = pooling_window(self.exit, (height, width)) if pools else (1, 1)
        features = empty_images(x, images, self.total, height, width) if keep_features else None
        out = empty_images(x, images, self.out_channels, height // window[0], width // window[1])
        torch.ops.densenet_efficient.dense_stage_inference(
            as_rows(x), height, width, self.bottleneck_channels, self.growth_rate,
            prepared.affines, prepared.weights, prepared.exit_affine, prepared.exit_weight, window,
            None if features is None else as_rows(features), as_rows(out) if self.out_channels else None,
        )  # fmt: skip
        if self.exit == TRANSITION_DOWN:
            out = F.max_pool2d(out, 2)
        elif self.exit == HEAD:
            out = out.flatten(1)
        return out, x.new_empty(0) if features is None else features

    def _prepare(self, x: Tensor) -> Prepared:
        dtype = kernels.accumulation_dtype(x.dtype)
        pack = torch.ops.densenet_efficient.packed_weight
        return Prepared(
            [_affine(norm, dtype) for norm in self.norms],
            [pack(conv.weight, x.dtype) for conv in self.convolutions],
            None if self.exit_norm is None else _affine(self.exit_norm, dtype),
            None if self.exit_conv is None else pack(self.exit_conv.weight, x.dtype),
        )


def applies(x: Tensor) -> bool:
    """Whether a forward of ``x`` is wanted for its values alone (no gradient, no trace), on the native CPU backend."""
    return (
        not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and type(x) is Tensor
        and x.device.type == "cpu"
        and torch._C._get_tracing_state() is None
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._functorch.is_functorch_wrapped_tensor(x)
        and kernels.backend_name(x.device) == "cpu"
    )


_plans: WeakKeyDictionary[nn.Module, Plan] = WeakKeyDictionary()


def kept_plan(block: nn.Module, consumer: nn.Module | None) -> Plan | None:
    """The plan kept for ``block`` with this consumer, where it is still valid."""
    plan = _plans.get(block)
    return plan if plan is not None and plan.is_valid(consumer) else None


def forget_plan(block: nn.Module) -> None:
    """Let go of what is kept for ``block``: a training is about to change its weights.

    It needs no memory then, and FSDP gathers new weights into the same tensors without a new version.
    """
    if not torch.compiler.is_compiling():
        _plans.pop(block, None)


def make_plan(stage: Stage) -> Plan | None:
    """A plan for ``stage``, kept for the next calls; None where its statistics or weights may not be kept."""
    if any(map(fusion.uses_batch_statistics, stage.every_norm)):
        return None
    if any(tensor.is_inference() for _, _, tensor in _tensors_of(stage)):
        return None  # made under torch.inference_mode: nothing tells when they change
    plan = _plans[stage.block] = Plan(stage)
    return plan


def _tensors_of(stage: Stage) -> list[tuple[dict[str, Any], str, Tensor]]:
    """The parameters and buffers that an inference reads, with the dictionaries that hold them."""
    return [
        (owner, name, tensor)
        for module in (*stage.every_norm, *stage.every_convolution)
        for owner in (module._parameters, module._buffers)
        for name, tensor in owner.items()
        if tensor is not None and name != "num_batches_tracked"
    ]


def _affine(norm: BatchNorm, dtype: torch.dtype) -> Tensor:
    """[4, C] of a norm that uses its running statistics."""
    assert norm.running_mean is not None and norm.running_var is not None
    affine = norm.weight.new_empty(4, norm.num_features, dtype=dtype)
    kernels.cpu.batch_norm_affine(norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps, affine)
    return affine
