"""Looks a model through, and changes nothing: which of its modules can run as ours, and why the others cannot."""

from __future__ import annotations

from itertools import pairwise
from typing import cast

from torch import nn
from torch.jit import ScriptModule

from .. import fusion
from ..dimensions import Convolution
from ..fusion import LayerParts
from ..operator_calls import StageBlock
from ..stage import TRANSITION
from .clones import is_clone, read_clone
from .libraries import LIBRARIES, base_class, library_of_block
from .modules import (
    Converted,
    ConvertedBlock,
    ConvertedFeatureNet,
    ConvertedLayerGetter,
    ConvertedMonai,
    ConvertedSequential,
    ConvertedTimm,
    ConvertedTorchvision,
    ConvertedXray,
)
from .report import Entry, Report

# (library's module, class, the methods that must be the library's own): what a converted instance becomes
Roles = dict[tuple[str, str, tuple[str, ...]], type[Converted]]
TIMM_METHODS = ("forward", "forward_features", "forward_head", "forward_intermediates")
NETWORKS: Roles = {
    ("torchvision.models.densenet", "DenseNet", ("forward",)): ConvertedTorchvision,
    ("timm.models.densenet", "DenseNet", TIMM_METHODS): ConvertedTimm,
    ("monai.networks.nets.densenet", "DenseNet", ("forward",)): ConvertedMonai,
    ("torchxrayvision.models", "DenseNet", ("forward", "features2")): ConvertedXray,
}
SEQUENCES: Roles = {
    ("torch.nn.modules.container", "Sequential", ("forward",)): ConvertedSequential,
    ("torchvision.models._utils", "IntermediateLayerGetter", ("forward",)): ConvertedLayerGetter,
    ("timm.models._features", "FeatureListNet", ("forward", "_collect")): ConvertedFeatureNet,
    ("timm.models._features", "FeatureDictNet", ("forward", "_collect")): ConvertedFeatureNet,
}


class Survey:
    """What `convert` would do to ``model``.

    Attributes:
        report: one entry per dense block, and per transition, stem, last norm and forward beside one.
        roles: the modules to convert, with what each becomes.
        converted: the paths of blocks that are converted already.
        own_blocks: the paths of blocks of an EfficientDenseNet.
        stage_blocks: all of these, and those to convert.
        left_blocks: the blocks that stay as they are.
    """

    def __init__(self, model: nn.Module) -> None:
        self.report = Report()
        self.roles: dict[nn.Module, type[Converted]] = {}
        self.converted: list[str] = []
        self.own_blocks: list[str] = []
        self.stage_blocks: set[nn.Module] = set()
        self.left_blocks: set[nn.Module] = set()
        self.paths = {module: path for path, module in model.named_modules() if not isinstance(module, ScriptModule)}
        for module in self.paths:
            self._look_at_block(module)
        for module in self.paths:
            children = set(module.children())
            if children & self.left_blocks:
                self._leave_neighbours(module)
            if children & self.roles.keys() or (
                children & self.stage_blocks and role_of(module, SEQUENCES) is not None
            ):
                self._look_at_parent(module)
        for module in self.paths:
            self._look_at_network(module)
        order = list(self.paths.values())
        for entries in (self.report.replaced, self.report.left):
            entries.sort(key=lambda entry: order.index(entry.path))

    def _look_at_block(self, module: nn.Module) -> None:
        library = library_of_block(type(module))
        if isinstance(module, StageBlock):
            self.stage_blocks.add(module)
        if isinstance(module, ConvertedBlock):
            self.converted.append(self.paths[module])
            self._replace(module, "converted already")
        elif isinstance(module, StageBlock):
            self.own_blocks.append(self.paths[module])
        elif library is None and is_clone(module):
            self._judge(module, read_clone(module, type(module), try_anew=True))
        elif library is not None:
            block = cast(type, base_class(type(module), library.module, library.block))
            if not has_methods_of(module, block, ("forward",)):
                self._leave_block(module, f"its forward is not that of {library.name}'s {library.block}")
                return
            self._judge(module, fusion.read_block(module, library.read_layer))

    def _judge(self, block: nn.Module, layers: list[LayerParts] | str) -> None:
        if isinstance(layers, str):
            self._leave_block(block, layers)
        else:
            self.roles[block] = ConvertedBlock
            self.stage_blocks.add(block)
            self._replace(block, f"{len(layers)} layers over one storage")

    def _leave_neighbours(self, parent: nn.Module) -> None:
        """What would be one operator with the blocks in ``parent`` that stay as they are."""
        children = [child for child in parent._modules.values() if child is not None]
        is_sequence = role_of(parent, SEQUENCES) is not None
        for block, child in pairwise(children):
            is_last = is_sequence and child is children[-1] and child not in self.left_blocks
            if block in self.left_blocks and (isinstance(child, nn.Sequential) or is_last):
                self._leave(child, "its block is left")

    def _look_at_parent(self, parent: nn.Module) -> None:
        """The neighbours of converted blocks, and their parent where it is known to run its children in order."""
        role = role_of(parent, SEQUENCES)
        children = [child for child in parent._modules.values() if child is not None]
        if role is not None:
            self.roles[parent] = role
            condition = self._condition(parent) if role is ConvertedSequential else ""
            self._replace(
                parent, f"runs its stem, and its blocks with what consumes them, as one operator each{condition}"
            )
        for index, child in enumerate(children):
            follows_block = index > 0 and children[index - 1] in self.stage_blocks
            if follows_block and isinstance(child, nn.Sequential) and child not in self.roles:
                self._look_at_transition(child, role, parent)
        if isinstance(children[0], Convolution):
            self._look_at_stem(children, role, parent)

    def _condition(self, sequence: nn.Module) -> str:
        """On what it depends whether ``sequence`` runs as a whole; nothing where its owner is known to call it."""
        owner = next((module for module in self.paths if sequence in module._modules.values()), None)
        if owner is None or isinstance(owner, nn.Sequential) or role_of(owner, NETWORKS) is not None:
            return ""
        return f", where {type(owner).__name__}'s own forward calls it as a whole"

    def _look_at_stem(self, children: list[nn.Module], role: type[Converted] | None, parent: nn.Module) -> None:
        stem = fusion.take_stem(children)
        if role is None or stem is None:
            self._leave(children[0], "not conv, BatchNorm, ReLU and 3x3 maximum pooling in a known sequence")
        elif set(list(parent._modules)[: -len(stem[2]) - 1]) & set(getattr(parent, "return_layers", ())):
            self._leave(children[0], "what comes before its pooling is returned")
        else:
            self._replace(children[0], "the stem: one operator with its norm, ReLU and pooling")

    def _look_at_transition(self, transition: nn.Sequential, role: type[Converted] | None, parent: nn.Module) -> None:
        if role is None:
            self._leave(transition, f"called by {type(parent).__name__}'s own forward, not with its block")
        elif (read := fusion.read_transition(transition)) is None or read.kind != TRANSITION:
            self._leave(transition, "not BatchNorm, ReLU, 1x1 convolution and 2x2 average pooling, unobserved")
        else:
            self._replace(transition, "one operator with its block")

    def _look_at_network(self, module: nn.Module) -> None:
        """A whole network, for its head."""
        features = module._modules.get("features")
        if features is None or self.roles.get(features) is not ConvertedSequential:
            return
        children = list(features.children())
        if len(children) < 2 or children[-2] not in self.stage_blocks or not fusion.is_last_norm(children[-1]):
            return
        role = role_of(module, NETWORKS)
        if role is None:
            self._leave(children[-1], f"{type(module).__name__}'s own forward calls what follows it")
            return
        self.roles[module] = role
        self._replace(children[-1], "the head: one operator with the last block, where average pooling follows")

    def _leave_block(self, block: nn.Module, note: str) -> None:
        self.left_blocks.add(block)
        self._leave(block, note)

    def _replace(self, module: nn.Module, note: str) -> None:
        self.report.replaced.append(Entry(self.paths[module], type(module).__name__, note))

    def _leave(self, module: nn.Module, note: str) -> None:
        self.report.left.append(Entry(self.paths[module], type(module).__name__, note))


def role_of(module: nn.Module, roles: Roles) -> type[Converted] | None:
    """What ``module`` may become: it is of a class of the table, or of a subclass that runs as that class does."""
    for (source, name, methods), role in roles.items():
        base = base_class(type(module), source, name)
        if base is not None:
            return role if has_methods_of(module, base, methods) else None
    return None


def has_methods_of(module: nn.Module, base: type, methods: tuple[str, ...]) -> bool:
    """Whether these methods of ``module`` are those of ``base``."""
    return all(
        getattr(type(module), name, None) is getattr(base, name, None) and name not in vars(module) for name in methods
    )


def searched_classes() -> str:
    """What is looked for, in words."""
    known = [f"{library.name}'s {library.block} ({library.module})" for library in LIBRARIES]
    return ", ".join([*known, "and blocks whose children are named denselayer1, denselayer2, ..."])
