"""DenseNets of other libraries made efficient in place: `convert`, and `revert`, which undoes it."""

from __future__ import annotations

from torch import nn
from torch.jit import ScriptModule

from ..argument_checks import check_level
from .modules import Converted, ConvertedBlock, replace_class, restore_class, set_level
from .report import Entry, Report
from .survey import Survey, searched_classes

__all__ = ["Entry", "Report", "convert", "revert"]


def convert(model: nn.Module, checkpointing: str = "bottleneck") -> Report:
    """Makes every DenseNet in ``model`` train with little memory, in place: torchvision's, timm's, MONAI's or
    torchxrayvision's, or one written after torchvision's, in one, two or three dimensions, whole or as a part of a
    detector, a U-Net, a Lightning module.

    Modules keep their children, parameters, buffers and hooks, the same objects under the same names: optimizers, EMA
    copies and state_dicts stay valid. Only the classes of blocks, of sequences that hold them, and of networks become
    subclasses with another forward. A block that is changed or hooked later runs through its modules, and says so once.
    timm's ``set_grad_checkpointing`` sets the level afterwards; torchvision's ``memory_efficient`` has no effect.
    A model that is converted already only gets the level.

    A block of another library or of your own is taken where its children are named as torchvision's and its forward,
    tried on a copy with random weights and images, gives what a dense block gives.

    Args:
        model: any module that is or contains a DenseNet.
        checkpointing: "none" saves the bottleneck outputs for the backward, "bottleneck" recomputes them.

    Returns:
        What was replaced, and what was left and why; ``print`` gives a table.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: the level is unknown; there is no DenseNet in ``model``, or it is converted in part. ``model`` is
            as it was.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module that contains a DenseNet, got a {type(model).__name__}")
    check_level(checkpointing)
    survey = Survey(model)
    blocks = [path for module, path in survey.paths.items() if survey.roles.get(module) is ConvertedBlock]
    if survey.converted and blocks:
        raise ValueError(
            f"half of the model is converted: {survey.converted[0]} is, {blocks[0]} is not; revert(model) first"
        )
    if not (survey.report.replaced or survey.report.left):
        raise ValueError(f"found no DenseNet in a {type(model).__name__}: {_what_was_found(survey, model)}")
    _replace_classes(survey.roles)
    set_level(model, checkpointing)
    return survey.report


def revert(model: nn.Module) -> None:
    """Gives every module in ``model`` that was converted its own class back.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: nothing in it was converted.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module that was converted, got a {type(model).__name__}")
    converted = [module for module in model.modules() if isinstance(module, Converted)]
    if not converted:
        raise ValueError(f"nothing in this {type(model).__name__} was converted")
    for module in converted:
        restore_class(module)


def _replace_classes(roles: dict[nn.Module, type[Converted]]) -> None:
    """All of them or, where one raises, none."""
    try:
        for module, role in roles.items():
            replace_class(module, role)
    except Exception:
        for module in roles:
            if isinstance(module, Converted):
                restore_class(module)
        raise


def _what_was_found(survey: Survey, model: nn.Module) -> str:
    if survey.own_blocks:
        return f"{survey.own_blocks[0]} is a block of this package, which needs no conversion"
    if any(isinstance(module, ScriptModule) for module in model.modules()):
        return "what TorchScript has compiled or traced stays as it is; convert the model before"
    return f"looked for {searched_classes()}"
