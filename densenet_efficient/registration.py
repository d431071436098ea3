"""Registers functional operators that take hundreds of tensors in lists, as `torch.library.custom_op` registers others.

Torch's own looks at every value of every list in Python, several times in a call, to find its tensors: a fifth of what
the host takes for a step of DenseNet-201 on a GPU. Here a list is of tensors where its first value is one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch import _disable_dynamo as without_dynamo  # type: ignore[attr-defined]
from torch._C import DispatchKey, DispatchKeySet

NAMESPACE = "densenet_efficient"
LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")
# Where one of these comes first behind autograd, nobody else looks at a call: no tracer, no mode, no subclass.
BACKENDS = (DispatchKey.CPU, DispatchKey.CUDA)


class Layout:
    """Where the tensors among some values stand in one flat list."""

    def __init__(self, values: Sequence[Any]) -> None:
        self._places: list[tuple[int | slice | None, Any]] = []  # each with the value itself where it has none
        self.size = 0
        for value in values:
            if isinstance(value, Tensor):
                self._add(self.size, 1)
            elif isinstance(value, list) and value and isinstance(value[0], Tensor):
                self._add(slice(self.size, self.size + len(value)), len(value))
            else:
                self._places.append((None, value))

    def _add(self, place: int | slice, size: int) -> None:
        self._places.append((place, None))
        self.size += size

    def flatten(self, values: Sequence[Any]) -> list[Any]:
        """The values that stand at the places of tensors, in one list; None for a list stands for as many."""
        flat = [None] * self.size
        for value, (place, _) in zip(values, self._places, strict=True):
            if place is not None and value is not None:
                flat[place] = value
        return flat

    def arrange(self, flat: Sequence[Any]) -> list[Any]:
        """The reverse of `flatten`, with all other values where they were."""
        return [
            value if place is None else list(flat[place]) if isinstance(place, slice) else flat[place]
            for place, value in self._places
        ]


class Call:
    """What the derivative of a call has to know of it, beside what it saves."""

    def __init__(self, keyset: DispatchKeySet, arguments: Sequence[Any]) -> None:
        self.keyset = keyset
        self.inputs = Layout(arguments)
        self.outputs = Layout(())  # once it is computed


def register(name: str, function: Callable[..., Any]) -> Any:
    """The operator ``name``, which computes ``function`` on every device; its annotations are the schema."""
    schema = torch.library.infer_schema(function, mutates_args=())
    LIBRARY.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, without_dynamo(function), "CompositeExplicitAutograd")
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def register_fake(operator: Any, function: Callable[..., Any]) -> None:
    """``function`` makes what the operator returns, but its values."""
    torch.library.register_fake(operator.name(), function, lib=LIBRARY)


def register_autograd(
    operator: Any,
    function: Callable[..., Any],
    save: Callable[[Any, Sequence[Any], Any], None],
    differentiate: Callable[..., Sequence[Any]],
) -> None:
    """The derivative of the operator that computes ``function``.

    ``save(ctx, inputs, output)`` is as `torch.autograd.Function.setup_context`. ``differentiate(ctx, needed, *grads)``
    takes the gradients of the outputs and returns those of the inputs, a list for a list; ``needed`` says in the same
    way which of them are.
    """

    def compute(keyset: DispatchKeySet, arguments: Sequence[Any]) -> Any:
        behind = keyset & torch._C._after_ADInplaceOrView_keyset
        with torch._C._AutoDispatchBelowAutograd():
            if behind.highestPriorityTypeId() in BACKENDS:
                return function(*arguments)
            return operator.redispatch(behind, *arguments)

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, call: Call, *tensors: Tensor) -> tuple[Tensor, ...]:
            arguments = call.inputs.arrange(tensors)
            output = compute(call.keyset, arguments)
            save(ctx, arguments, output)
            outputs = output if isinstance(output, tuple) else (output,)
            ctx.call, call.outputs = call, Layout(outputs)
            return tuple(call.outputs.flatten(outputs))

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            call = ctx.call
            needed = call.inputs.arrange(ctx.needs_input_grad[1:])
            return None, *call.inputs.flatten(differentiate(ctx, needed, *call.outputs.arrange(grads)))

    @without_dynamo
    def run(keyset: DispatchKeySet, *arguments: Any) -> Any:
        call = Call(keyset, arguments)
        tensors = call.inputs.flatten(arguments)
        if not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)):
            return compute(keyset, arguments)
        results = Differentiable.apply(call, *tensors)  # which lays out the outputs
        outputs = call.outputs.arrange(results)
        return tuple(outputs) if len(outputs) > 1 else outputs[0]

    LIBRARY.impl(operator._opname, run, "Autograd", with_keyset=True)
