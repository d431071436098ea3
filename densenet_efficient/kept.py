"""What is kept beside a block for as long as it lives: it is in no copy of the block, and in no file."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from .inference import Plan
    from .readings import Reading

ATTRIBUTE = "_kept"


class Kept:
    """What was read of a block, and what was prepared for it.

    The block itself holds it, not a dictionary with weak keys: both lead back to what the block is made of, from its
    hooks perhaps to the whole model, which then nothing would ever free.
    """

    def __init__(self) -> None:
        self.reading: Reading | None = None
        self.plan: Plan | None = None

    def __reduce__(self) -> tuple[type[Kept], tuple[()]]:
        """Copies and files have nothing of it."""
        return Kept, ()


def beside(block: nn.Module) -> Kept:
    """What is kept beside ``block``: at first, nothing."""
    attributes = block.__dict__  # around `nn.Module.__setattr__`, which a subclass may have changed
    found: Kept | None = attributes.get(ATTRIBUTE)
    return found if found is not None else attributes.setdefault(ATTRIBUTE, Kept())
