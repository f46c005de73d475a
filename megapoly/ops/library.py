"""Registration with ``torch.library``: ``torch.ops.megapoly``.

Registered operators are single nodes to everything that traces: ``torch.compile`` keeps a model
with them in one graph, selective activation checkpointing can name them, and their collectives and
kernels are not looked into.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

NAMESPACE = "megapoly"
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")
# A shape that no result has. Empty: what is never written must not be read, not even to compare.
_ABSENT = (0, 0, 0)


def operator(
    schema: str, *, fake: Callable[..., Any]
) -> Callable[[Callable[..., Any]], torch._ops.OpOverload]:
    """Register a function as an operator; the decorated name is then the operator.

    Args:
        schema: name and types, as in ``torch.library.define``.
        fake: the same function on tensors without data: shapes and dtypes of the results.
    """
    name = schema.partition("(")[0]

    def register(function: Callable[..., Any]) -> torch._ops.OpOverload:
        _LIBRARY.define(schema)
        _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)
        overload: torch._ops.OpOverload = getattr(torch.ops.megapoly, name).default
        return overload

    return register


def differentiate(
    operator: torch._ops.OpOverload,
    *,
    save: Callable[..., None],
    backward: Callable[..., Any],
) -> None:
    """Give an operator its gradient.

    Args:
        operator: what :func:`operator` made.
        save: ``save(ctx, inputs, output)`` in the forward pass.
        backward: ``backward(ctx, *grads)``: one gradient or None for each input.
    """
    torch.library.register_autograd(operator, backward, setup_context=save, lib=_LIBRARY)


def refuse_second_derivative(operator: torch._ops.OpOverload) -> None:
    """Make differentiating a backward operator an error; torch itself would only warn."""

    def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise NotImplementedError(
            f"{operator} has no derivative: PolyCom activations can be differentiated once."
        )

    differentiate(operator, save=save, backward=backward)


def present(tensor: Tensor) -> Tensor | None:
    """What an operator returned for a result that may be absent: schemas have no such type."""
    return None if tensor.shape == _ABSENT else tensor


def absent(like: Tensor) -> Tensor:
    """Stands for a result that there is not."""
    return like.new_empty(_ABSENT)


def or_absent(tensor: Tensor | None, like: Tensor) -> Tensor:
    """``tensor``, or what stands for None."""
    return absent(like) if tensor is None else tensor
