"""What is kept beside a module for as long as it lives: it is in no copy of the module, and in no file."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from .inference import CastLinear, PreparedStage
    from .readings import Reading

ATTRIBUTE = "_kept"


class Kept:
    """What was read of a block, and what was prepared for it, or for a classifier.

    The module itself holds it, not a dictionary with weak keys: both lead back to what a block is made of, from its
    hooks perhaps to the whole model, which then nothing would ever free.
    """

    def __init__(self) -> None:
        self.reading: Reading | None = None
        self.stage: PreparedStage | None = None
        self.cast: CastLinear | None = None

    def __reduce__(self) -> tuple[type[Kept], tuple[()]]:
        """Copies and files have nothing of it."""
        return Kept, ()


def beside(module: nn.Module) -> Kept:
    """What is kept beside ``module``: at first, nothing."""
    attributes = module.__dict__  # around `nn.Module.__setattr__`, which a subclass may have changed
    found: Kept | None = attributes.get(ATTRIBUTE)
    return found if found is not None else attributes.setdefault(ATTRIBUTE, Kept())
