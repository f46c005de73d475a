"""Registration with ``torch.library``: ``torch.ops.megapoly``.

A registered operator is a single node for everything that traces: ``torch.compile`` keeps a model
with operators in one graph and does not look into their collectives and kernels, and selective
activation checkpointing can refer to them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

NAMESPACE = "megapoly"
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")
# A shape that no result has; empty, so that no uninitialised memory is ever read.
_ABSENT = (0, 0, 0)


def operator(
    schema: str, *, fake: Callable[..., Any]
) -> Callable[[Callable[..., Any]], torch._ops.OpOverload]:
    """Register the decorated function as an operator; the name then refers to the operator.

    Args:
        schema: name and types, as in ``torch.library.define``.
        fake: the function for tensors without data: returns shapes and dtypes of the results.
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
    """Register the gradient of an operator.

    Args:
        operator: from :func:`operator`.
        save: ``save(ctx, inputs, output)`` in the forward pass.
        backward: ``backward(ctx, *grads)``: one gradient or None for each input.
    """
    torch.library.register_autograd(operator, backward, setup_context=save, lib=_LIBRARY)


def refuse_second_derivative(operator: torch._ops.OpOverload) -> None:
    """Make it an error to differentiate a backward operator; torch would only warn."""

    def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise NotImplementedError(
            f"{operator} has no derivative: PolyCom activations can be differentiated once; "
            "do not use `create_graph`."
        )

    differentiate(operator, save=save, backward=backward)


def present(tensor: Tensor) -> Tensor | None:
    """Return None for the placeholder of :func:`absent`; schemas have no optional results."""
    return None if tensor.shape == _ABSENT else tensor


def absent(like: Tensor) -> Tensor:
    """Return a placeholder for an optional result that is absent."""
    return like.new_empty(_ABSENT)


def or_absent(tensor: Tensor | None, like: Tensor) -> Tensor:
    """Return ``tensor``, or the placeholder if it is None."""
    return absent(like) if tensor is None else tensor
