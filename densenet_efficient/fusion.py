"""Which modules may run as one operator: those that are exactly what it computes, and that nobody observes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx import Proxy
from torch.nn.modules import module as module_hooks

from .dimensions import (
    AVG_POOLS,
    BATCH_NORMS,
    CONVOLUTIONS,
    MAX_POOLS,
    BatchNorm,
    Convolution,
    MaxPool,
    dims_of,
    is_for,
)
from .dropout import Dropout
from .stage import HEAD, NO_EXIT, TRANSITION, TRANSITION_DOWN

PLAIN_NORMS = frozenset({*BATCH_NORMS.values(), nn.SyncBatchNorm})
PLAIN_CONVOLUTIONS = frozenset(CONVOLUTIONS.values())
COMMON_GEOMETRIES = {((1, 1), (1, 1), (0, 0)), ((3, 3), (1, 1), (1, 1))}  # kernel size, dilation, padding
ONES = {(1,), (1, 1), (1, 1, 1)}  # a kernel size or a stride of one along each axis
BATCH_NORM_WITH_ACTIVATION = ("timm.layers.norm_act", "BatchNormAct2d")


def uses_batch_statistics(norm: BatchNorm) -> bool:
    """Whether ``norm`` normalises by the batch (as torch.nn.BatchNorm2d decides it)."""
    return norm.training or norm.running_mean is None or norm.running_var is None


def is_observed(module: nn.Module) -> bool:
    """Whether a call of ``module`` has effects besides its forward: hooks, or a forward set on the instance."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in vars(module)
    )


def tracer(x: object, training: bool) -> str | None:
    """What records or transforms the forward of ``x`` and must see PyTorch's own operations, in words.

    None in an ordinary forward, and in one that torch.compile compiles for training: these run our operators.
    """
    if isinstance(x, Proxy):
        return "torch.fx traces its modules"
    if _is_transformed():
        return "torch.func or forward-mode differentiation transforms it"
    if torch._C._get_tracing_state() is not None:
        return "torch.jit traces it"
    if _is_exporting() or (torch.compiler.is_compiling() and not training):
        return "torch.export or torch.compile records it"
    return None


def _is_transformed() -> bool:
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def _is_exporting() -> bool:
    return torch.compiler.is_exporting()


# torch.compile cannot trace the first, but enters the transforms while it traces; of the second torch 2.11 says True in
# every compilation. torch.compiler.assume_constant_result sets the same mark, and imports the compiler for it, which
# takes as long as torch itself.
_is_transformed._dynamo_marked_constant = True  # type: ignore[attr-defined]
_is_exporting._dynamo_marked_constant = True  # type: ignore[attr-defined]


def any_global_hook() -> bool:
    """Whether hooks are registered for all modules (register_module_forward_hook and others)."""
    return bool(
        module_hooks._global_forward_hooks
        or module_hooks._global_forward_pre_hooks
        or module_hooks._global_backward_hooks
        or module_hooks._global_backward_pre_hooks
    )


Dropping = tuple[float, bool, bool]  # how a dropout drops: its rate, whether it does, and whether whole channels


def dropping(rate: float, training: bool, drops_channels: bool = False) -> Dropping:
    """The same of all that drop nothing: then their rates and modes are for nobody to see."""
    return (rate, True, drops_channels) if rate and training else (0.0, False, False)


@dataclass
class LayerParts:
    """What a dense layer computes with, whatever its class; without a bottleneck there is neither norm2 nor conv2."""

    norm1: BatchNorm
    conv1: Convolution
    norm2: BatchNorm | None
    conv2: Convolution | None
    drop_rate: float
    training: bool  # of the dropout
    drops_channels: bool = False  # whole channels, as nn.Dropout2d does

    @property
    def bottleneck(self) -> bool:
        """Whether the layer has the 1x1 convolution."""
        return self.conv2 is not None

    @property
    def norms(self) -> list[BatchNorm]:
        """norm1 and, with a bottleneck, norm2."""
        return [self.norm1] if self.norm2 is None else [self.norm1, self.norm2]

    @property
    def convolutions(self) -> list[Convolution]:
        """conv1 and, with a bottleneck, conv2."""
        return [self.conv1] if self.conv2 is None else [self.conv1, self.conv2]

    @property
    def dilation(self) -> int:
        """Of the last convolution."""
        return int(self.convolutions[-1].dilation[0])

    @property
    def spatial_dims(self) -> int:
        """1, 2 or 3."""
        return dims_of(self.conv1)

    @property
    def channels(self) -> list[int]:
        """What every layer of a block has in common: [bottleneck channels,] growth rate."""
        return [conv.out_channels for conv in self.convolutions]

    @property
    def dropout(self) -> Dropping:
        return dropping(self.drop_rate, self.training, self.drops_channels)


def read_block(block: nn.Module, read: Callable[[nn.Module], LayerParts | str]) -> list[LayerParts] | str:
    """The layers of ``block`` as ``read`` finds them, or why they cannot run as one operator."""
    if any_global_hook():
        return "hooks are registered for all modules"
    layers: list[LayerParts] = []
    for name, layer in block._modules.items():
        parts = read(cast(nn.Module, layer))
        if isinstance(parts, str):
            return f"{name}{parts}"
        if layers and not _follows(layers, parts):
            return f"{name} has other channel counts than its place in the block asks for"
        if layers and parts.spatial_dims != layers[0].spatial_dims:
            return f"{name} has {parts.spatial_dims} spatial dimensions, the layers before it {layers[0].spatial_dims}"
        if layers and parts.dropout != layers[0].dropout:
            return f"{name} has a dropout of its own"
        layers.append(parts)
    return layers or "it has no layers"


def _follows(layers: list[LayerParts], parts: LayerParts) -> bool:
    """Whether ``parts`` has the channels of a layer that stands behind ``layers``."""
    return parts.channels == layers[0].channels and parts.norm1.num_features == channels_behind(layers)


def channels_behind(layers: list[LayerParts]) -> int:
    """Those of a block's input, and those that its layers add."""
    first = layers[0]
    return first.norm1.num_features + len(layers) * first.channels[-1]


def read_layer(modules: Mapping[str, nn.Module | None], drop_rate: float, training: bool) -> LayerParts | str:
    """The parts of a layer from its modules by name (norm1, relu1, conv1, norm2, relu2, conv2), or what is in the way.

    A norm of timm's that holds its ReLU needs no relu1. Other names are for the caller to allow or to refuse.
    """
    bottleneck = modules.get("conv2") is not None
    for index, keeps_size in (("1", _is_pointwise), ("2", _keeps_size)) if bottleneck else (("1", _keeps_size),):
        norm, conv = modules.get(f"norm{index}"), modules.get(f"conv{index}")
        if not holds_norm_and_relu(norm):
            if not is_plain_norm(norm):
                return f".norm{index} {_what_is_wrong_with(norm)}"
            if not _is_plain(modules.get(f"relu{index}"), nn.ReLU):
                return f".relu{index} is replaced or observed"
        if not keeps_size(conv):
            return f".conv{index} {_what_is_wrong_with_convolution(conv)}"
    norms = [cast(BatchNorm, modules.get(name)) for name in ("norm1", "norm2")]
    convolutions = [cast(Convolution, modules.get(name)) for name in ("conv1", "conv2")]
    parts = LayerParts(norms[0], convolutions[0], norms[1], convolutions[1], drop_rate, training)
    widths = [norm.num_features for norm in parts.norms]
    if [conv.in_channels for conv in parts.convolutions] != widths or parts.channels[:-1] != widths[1:]:
        return " has other channel counts than its norms"
    dims = parts.spatial_dims
    if any(dims_of(conv) != dims for conv in parts.convolutions) or not all(is_for(norm, dims) for norm in parts.norms):
        return " has norms and convolutions of different spatial dimensions"
    return parts


def _what_is_wrong_with(norm: nn.Module | None) -> str:
    if is_class(norm, *BATCH_NORM_WITH_ACTIVATION) and norm is not None:
        return f"holds a {type(norm._modules['act']).__name__}, is observed or incomplete; expected ReLU"
    if isinstance(norm, BatchNorm) and _has_affine_map(norm) and not has_own_shape(norm):
        return f"has parameters of {norm.weight.numel()} channels, its num_features are {norm.num_features}"
    return f"is a {type(norm).__name__}, observed or incomplete; expected BatchNorm1d, 2d or 3d with affine parameters"


def _what_is_wrong_with_convolution(conv: nn.Module | None) -> str:
    if type(conv) in PLAIN_CONVOLUTIONS and not has_own_shape(cast(Convolution, conv)):
        return "has a weight of another shape than its out_channels, in_channels and kernel_size tell"
    return "is replaced, observed or of another geometry"


def has_own_shape(module: BatchNorm | Convolution) -> bool:
    """Whether its weight has the shape that its attributes tell.

    What runs as one operator is decided by them, while torch's forward reads the weight alone: a user may have put
    another in its place, as the pruning of channels does.
    """
    return isinstance(module.weight, Tensor) and module.weight.shape == own_shape(module)


def own_shape(module: BatchNorm | Convolution) -> tuple[int, ...]:
    """The shape of its weight that its attributes tell."""
    if isinstance(module, Convolution):
        return module.out_channels, module.in_channels // module.groups, *module.kernel_size
    return (module.num_features,)


def take_norm_relu(modules: list[nn.Module]) -> tuple[BatchNorm, list[nn.Module]] | None:
    """The norm that comes first, with its ReLU, and what follows them; None where something else comes."""
    if modules and holds_norm_and_relu(modules[0]):
        return cast(BatchNorm, modules[0]), modules[1:]
    if len(modules) > 1 and is_plain_norm(modules[0]) and _is_plain(modules[1], nn.ReLU):
        return cast(BatchNorm, modules[0]), modules[2:]
    return None


def take_stem(children: list[nn.Module]) -> tuple[Convolution, BatchNorm, list[nn.Module]] | None:
    """The stem's convolution and norm, and what follows its pooling.

    None unless conv, norm, ReLU and the 3x3 maximum pooling of the paper come first, of the same channels.
    """
    if not children or any_global_hook() or not _is_plain_conv(children[0]):
        return None
    conv = cast(Convolution, children[0])
    dims = dims_of(conv)
    taken = take_norm_relu(children[1:])
    if taken is None or not taken[1]:
        return None
    norm, (pool, *rest) = taken
    if not _is_plain(pool, MAX_POOLS[dims]) or _pooling(pool) != (3, 2, 1, 1, False, False):
        return None
    fit = is_for(norm, dims) and norm.num_features == conv.out_channels
    return (conv, norm, rest) if fit and _scalar(conv.dilation) == 1 else None


class StageExit(NamedTuple):
    """What consumes a dense block within its stage: its kind, as `stage.Stage` has it, the module, and its parts."""

    kind: str
    consumer: nn.Module | None = None
    norm: BatchNorm | None = None
    conv: Convolution | None = None
    dropout: Dropping | None = None  # of a transition down


NO_CONSUMER = StageExit(NO_EXIT)


def read_transition(transition: nn.Module) -> StageExit | None:
    """A plain transition, of a DenseNet or, down, of an FC-DenseNet.

    None unless it is an unobserved sequence of norm, ReLU and 1x1 convolution, followed by 2x2 average pooling, or by
    dropout and 2x2 maximum pooling.
    """
    taken = _take_pointwise(transition)
    if taken is None:
        return None
    norm, conv, rest = taken
    if len(rest) == 1 and _halves_by_average(rest[0], dims_of(conv)):
        return StageExit(TRANSITION, transition, norm, conv)
    if len(rest) == 2 and _is_plain(rest[0], Dropout, nn.Dropout) and _halves_by_maximum(rest[1]):
        drop = cast(nn.Dropout, rest[0])
        return StageExit(TRANSITION_DOWN, transition, norm, conv, dropping(drop.p, drop.training))
    return None


def read_head(norm: nn.Module) -> StageExit | None:
    """The last norm of a network, unobserved; None where ``norm`` is something else."""
    return StageExit(HEAD, norm, cast(BatchNorm, norm)) if is_last_norm(norm) else None


def is_as_read(stage_exit: StageExit) -> bool:
    """Whether its consumer still reads so."""
    if stage_exit.consumer is None:
        return True
    read = read_head if stage_exit.kind == HEAD else read_transition
    return read(stage_exit.consumer) == stage_exit


def is_last_norm(module: nn.Module) -> bool:
    """Whether ``module`` may join the last block as its exit."""
    return is_plain_norm(module) or holds_norm_and_relu(module)


def _halves_by_average(pool: nn.Module, dims: int) -> bool:
    if not _is_plain(pool, AVG_POOLS[dims]):
        return False
    sizes = _scalar(pool.kernel_size), _scalar(pool.stride), _scalar(pool.padding)
    divisor = getattr(pool, "divisor_override", None)  # which one dimension has not
    return sizes == (2, 2, 0) and not pool.ceil_mode and divisor is None


def _halves_by_maximum(pool: nn.Module) -> bool:
    return _is_plain(pool, nn.MaxPool2d) and _pooling(pool) == (2, 2, 0, 1, False, False)


def _take_pointwise(transition: nn.Module) -> tuple[BatchNorm, Convolution, list[nn.Module]] | None:
    """The norm, with its ReLU, and the 1x1 convolution that begin an unobserved sequence, and what follows them."""
    if not isinstance(transition, nn.Sequential) or type(transition).forward is not nn.Sequential.forward:
        return None
    taken = take_norm_relu(list(transition))
    if is_observed(transition) or taken is None or not taken[1]:
        return None
    norm, (module, *rest) = taken
    if not _is_pointwise(module):
        return None
    conv = cast(Convolution, module)
    fit = is_for(norm, dims_of(conv)) and norm.num_features == conv.in_channels
    return (norm, conv, rest) if fit else None


def is_class(module: object, source: str, name: str) -> bool:
    """Whether ``module`` is of exactly this class of another library, which need not be installed."""
    return type(module).__module__ == source and type(module).__name__ == name


def _is_plain(module: nn.Module | None, *kinds: type[nn.Module]) -> bool:
    return module is not None and type(module) in kinds and not is_observed(module)


def is_plain_norm(module: nn.Module | None) -> bool:
    """Whether ``module`` is a BatchNorm1d, 2d or 3d, or a synchronised one, with gamma and beta, unobserved."""
    if type(module) not in PLAIN_NORMS:
        return False
    norm = cast(BatchNorm, module)
    return not is_observed(norm) and _is_whole(norm)


def holds_norm_and_relu(module: nn.Module | None) -> bool:
    """Whether ``module`` is a BatchNormAct2d of timm's with gamma, beta and a ReLU, unobserved."""
    return (
        is_class(module, *BATCH_NORM_WITH_ACTIVATION)
        and isinstance(module, nn.BatchNorm2d)
        and not is_observed(module)
        and _is_whole(module)
        and _is_plain(module._modules["act"], nn.ReLU)
        and _is_plain(module._modules["drop"], nn.Identity)
    )


def _is_whole(norm: BatchNorm) -> bool:
    """Whether ``norm`` has gamma and beta (its flag tells whether it was made so), and both statistics or neither.

    For as many channels as it says.
    """
    has_statistics_or_not = (norm.running_mean is None) == (norm.running_var is None)
    return _has_affine_map(norm) and has_statistics_or_not and has_own_shape(norm)


def _has_affine_map(norm: BatchNorm) -> bool:
    return norm.weight is not None and norm.bias is not None


def _is_plain_conv(module: nn.Module | None) -> bool:
    if type(module) not in PLAIN_CONVOLUTIONS:
        return False
    conv = cast(Convolution, module)
    return (
        not is_observed(conv)
        and conv.bias is None
        and conv.groups == 1
        and conv.padding_mode == "zeros"
        and not isinstance(conv.padding, str)
        and has_own_shape(conv)
    )


def _is_pointwise(module: nn.Module | None) -> bool:
    """Whether ``module`` is a plain convolution of every pixel by itself."""
    return _keeps_size(module) and cast(Convolution, module).kernel_size in ONES


def _keeps_size(module: nn.Module | None) -> bool:
    """Whether ``module`` is a plain convolution with odd kernel sizes, one dilation and as much padding as it needs."""
    if not _is_plain_conv(module):
        return False
    conv = cast(Convolution, module)
    if conv.stride not in ONES:
        return False
    if (conv.kernel_size, conv.dilation, conv.padding) in COMMON_GEOMETRIES:
        return True
    dilation = conv.dilation[0]
    padding = tuple(dilation * (size // 2) for size in conv.kernel_size)
    return conv.padding == padding and set(conv.dilation) == {dilation} and all(size % 2 for size in conv.kernel_size)


def _pooling(pool: nn.Module) -> tuple[object, ...]:
    assert isinstance(pool, MaxPool)
    sizes = map(_scalar, (pool.kernel_size, pool.stride, pool.padding, pool.dilation))
    return (*sizes, pool.return_indices, pool.ceil_mode)


def _scalar(size: object) -> object:
    """A square size as one number."""
    return size[0] if isinstance(size, tuple) and len(set(size)) == 1 else size
