"""What a converted module is: an instance of a subclass of its own class, with another forward and nothing else new.

Its children, parameters, buffers and hooks stay the very objects they were, and so do all names and state_dict keys.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, cast

from torch import Tensor, nn

from .. import fusion
from ..dimensions import global_average
from ..fusion import LayerParts
from ..modules import run_children, run_features, run_named_children, take_stage
from ..operator_calls import BLOCK_ATTRIBUTES, StageBlock
from ..planning.free_bottlenecks import find_free_bottlenecks
from .clones import read_clone
from .libraries import library_of_block


class Converted(nn.Module):
    """The first base of every converted class; the second is the module's original class."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Copies and pickles by the two bases, because the class itself stands in no module."""
        return _new, type(self).__bases__, self.__dict__.copy()


_classes: dict[tuple[type[Converted], type[nn.Module]], type[Converted]] = {}


def converted_class(role: type[Converted], original: type[nn.Module]) -> type[Converted]:
    """The one subclass of ``original`` that plays ``role``."""
    bases = (role, original)
    if bases not in _classes:
        _classes[bases] = type(f"Converted{original.__name__.lstrip('_')}", bases, {"__module__": role.__module__})
    return _classes[bases]


def _new(role: type[Converted], original: type[nn.Module]) -> Converted:
    kind = converted_class(role, original)
    return kind.__new__(kind)


def replace_class(module: nn.Module, role: type[Converted]) -> None:
    """Makes ``module`` play ``role``, in place."""
    module.__class__ = converted_class(role, type(module))


def restore_class(module: Converted) -> None:
    """Undoes `replace_class`."""
    for name in BLOCK_ATTRIBUTES:
        vars(module).pop(name, None)
    module.__class__ = type(module).__bases__[1]


class ConvertedBlock(Converted, StageBlock):
    """A dense block of a library; the original forward serves where it cannot run as one operator."""

    def read(self) -> list[LayerParts] | str:
        """The layers as the operator takes them, or what is in the way."""
        library = library_of_block(type(self))
        if library is None:
            return read_clone(self, type(self).__bases__[1])
        return fusion.read_block(self, library.read_layer)

    def forward_by_layers(self, x: Tensor) -> Tensor:
        """The original forward.

        Its dropout draws numbers in the order of the memory; the original's features are contiguous, ours are not.
        """
        is_laid_out_anew = self.training and self._has_dropout() and not fusion.tracer(x, self.training)
        return cast(Tensor, super(StageBlock, self).forward(x.contiguous() if is_laid_out_anew else x))

    def _has_dropout(self) -> bool:
        return any(
            isinstance(module, nn.Dropout) or getattr(module, "drop_rate", 0)  # a module's, or functional
            for module in self.modules()
        )


class ConvertedSequential(Converted):
    """An nn.Sequential that holds dense blocks: its stem, and its blocks with their transitions, are one operator each.

    What is none of these runs as it did.
    """

    def forward(self, input: Tensor) -> Tensor:
        return run_features(list(cast(nn.Sequential, self)), input)

    def pooled(self, x: Tensor) -> Tensor | None:
        """relu(forward(x)) averaged over each image, [N, C]; None, with nothing run, where no operator gives that."""
        children = list(cast(nn.Sequential, self))
        if (
            len(children) < 2
            or fusion.tracer(x, self.training)
            or type(self).forward is not ConvertedSequential.forward
            or fusion.is_observed(self)
            or not fusion.is_last_norm(children[-1])
        ):
            return None
        if take_stage(children[-2:], with_head=True) is None:
            return None
        return run_children(children, x, with_head=True)[0]


def pooled_features(features: nn.Module, x: Tensor) -> Tensor | None:
    """`ConvertedSequential.pooled`, if that is what ``features`` is."""
    return features.pooled(x) if isinstance(features, ConvertedSequential) else None


def pooled_behind_relu(features: nn.Module, x: Tensor) -> Tensor | None:
    """`pooled_features`, also where somebody has taken the norm behind the last block away: the library rectifies in
    place, which autograd forbids of a block's features.
    """
    pooled = pooled_features(features, x)
    if pooled is not None or not isinstance(features, ConvertedSequential) or fusion.tracer(x, features.training):
        return pooled
    children = [child for child in features.children() if type(child) is not nn.Identity]
    if not (children and isinstance(children[-1], StageBlock)):
        return None
    out = features(x)
    return global_average(out, out.dim() - 2)


class ConvertedTorchvision(Converted):
    """torchvision's DenseNet, whose last norm and pooling join the last block."""

    features: nn.Module
    classifier: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        pooled = pooled_behind_relu(self.features, x)
        return cast(Tensor, super().forward(x) if pooled is None else self.classifier(pooled))


class ConvertedTimm(Converted):
    """timm's DenseNet, whose last norm and average pooling join the last block."""

    feature_ends: list[int]  # positions in features, of what feature_info lists
    features: nn.Module
    global_pool: nn.Module
    head_drop: nn.Module
    classifier: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        pooled = pooled_features(self.features, x) if self._pools_averages() else None
        return cast(Tensor, super().forward(x) if pooled is None else self.classifier(self.head_drop(pooled)))

    def _pools_averages(self) -> bool:
        pool = self.global_pool
        return (
            not any(name in self.__dict__ for name in ("forward_features", "forward_head"))
            and fusion.is_class(pool, "timm.layers.adaptive_avgmax_pool", "SelectAdaptivePool2d")
            and not fusion.is_observed(pool)
            and is_global_average(list(pool.children()))
        )

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """timm's switch: on means the level "bottleneck", off "none"."""
        super().set_grad_checkpointing(enable)  # type: ignore[misc]
        switch_level(self, enable)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """timm's: the features at ``indices`` of ``feature_info``, and the last ones before them unless these alone."""
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt must be NCHW, got {output_fmt!r}")
        from timm.models._features import feature_take_indices

        ends = self.feature_ends
        take, last = feature_take_indices(len(ends), indices)
        modules = list(self.features._modules.items())[: ends[last] + 1 if stop_early else None]
        wanted = {modules[ends[index]][0] for index in take if ends[index] < len(modules)}
        end = modules[-1][0]
        outputs = run_named_children(dict(modules), wanted | {end}, x)
        intermediates = [output for name, output in outputs.items() if name in wanted]
        return intermediates if intermediates_only else (outputs[end], intermediates)


class ConvertedMonai(Converted):
    """MONAI's DenseNet, whose last norm and average pooling join the last block."""

    features: nn.Module
    class_layers: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        head = self.class_layers
        if type(head) is not nn.Sequential or fusion.is_observed(head) or not _is_relu_and_average(list(head)):
            return cast(Tensor, super().forward(x))
        out = pooled_features(self.features, x)
        if out is None:
            return cast(Tensor, super().forward(x))
        for module in list(head)[3:]:
            out = module(out)
        return cast(Tensor, out)


class ConvertedXray(Converted):
    """torchxrayvision's DenseNet, whose last norm and pooling join the last block."""

    features: nn.Module

    def features2(self, x: Tensor) -> Tensor:
        """The pooled features, of images resized as theirs are."""
        resized = self._resized(x) if hasattr(self, "input_resolution") else x
        pooled = pooled_behind_relu(self.features, resized)
        return cast(Tensor, super().features2(x)) if pooled is None else pooled  # type: ignore[misc]

    def _resized(self, x: Tensor) -> Tensor:
        from torchxrayvision import utils

        resized = utils.fix_resolution(x, self.input_resolution, self)
        utils.warn_normalization(resized)
        return cast(Tensor, resized)


def is_global_average(modules: list[nn.Module]) -> bool:
    """Whether these are a pooling of each image to its average and the removal of its empty dimensions, unobserved."""
    if len(modules) != 2 or any(map(fusion.is_observed, modules)):
        return False
    pool, flatten = modules
    return (
        type(pool) in (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
        and pool.output_size in (1, (1,), (1, 1), (1, 1, 1))
        and type(flatten) is nn.Flatten
        and (flatten.start_dim, flatten.end_dim) == (1, -1)
    )


def _is_relu_and_average(modules: list[nn.Module]) -> bool:
    relu = modules[0] if modules else None
    return type(relu) is nn.ReLU and not fusion.is_observed(relu) and is_global_average(modules[1:3])


def set_level(model: nn.Module, level: str) -> None:
    """Gives every converted block this level of checkpointing."""
    for module in model.modules():
        if isinstance(module, ConvertedBlock):
            module.checkpointing = level
    for module in model.modules():
        if isinstance(module, ConvertedSequential):
            find_free_bottlenecks(list(cast(nn.Sequential, module)))


def switch_level(model: nn.Module, enable: bool) -> None:
    """Of every converted block: "bottleneck", or "none" where checkpointing is switched off."""
    set_level(model, "bottleneck" if enable else "none")


class ConvertedCollector(Converted):
    """A dictionary of modules that run in order, of which some outputs are returned: torchvision's and timm's."""

    return_layers: dict[str, Any]  # what each wanted output is called, by the name of its module

    def _features(self, x: Tensor) -> OrderedDict[Any, Tensor]:
        outputs = run_named_children(self._modules, self.return_layers, x)
        return OrderedDict((self.return_layers[name], output) for name, output in outputs.items())


class ConvertedLayerGetter(ConvertedCollector):
    """torchvision's IntermediateLayerGetter."""

    def forward(self, x: Tensor) -> OrderedDict[Any, Tensor]:
        return self._features(x)


class ConvertedFeatureNet(ConvertedCollector):
    """What timm makes with features_only=True."""

    grad_checkpointing: bool

    def _collect(self, x: Tensor) -> OrderedDict[Any, Tensor]:
        return super()._collect(x) if self.grad_checkpointing else self._features(x)  # type: ignore[misc]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """timm's switch: on means the level "bottleneck", off "none"; its own updates running statistics twice."""
        switch_level(self, enable)
