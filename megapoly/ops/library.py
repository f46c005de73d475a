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
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

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
    """Register the gradient of an operator, for ``backward`` and for ``torch.func``.

    ``torch.library.register_autograd`` would ignore the tangents of forward-mode differentiation,
    whose result would be a silent 0, and its functions do not work in ``torch.func.grad``.

    Args:
        operator: from :func:`operator`.
        save: ``save(ctx, inputs, output)`` in the forward pass.
        backward: ``backward(ctx, *grads)``: one gradient or None for each input.
    """

    # The dispatcher calls it for each level of `torch.func` by itself; `torch.autograd.Function`
    # would begin with the levels anew.
    class Gradient(_SingleLevelFunction):
        @staticmethod
        def forward(*inputs: Any) -> Any:
            # torch disables gradients here; an outer level of `torch.func` would see a constant,
            # and a nested `grad` would be 0 without an error.
            with torch.set_grad_enabled(torch._C._are_functorch_transforms_active()):
                return _below_autograd(operator, inputs)

        @staticmethod
        def jvp(ctx: Any, *tangents: Any) -> Any:
            raise NotImplementedError(
                f"{operator} has no forward-mode derivative; use reverse mode (`backward`, "
                "`torch.autograd.grad`, `torch.func.grad`, `torch.func.jacrev`)."
            )

    Gradient.setup_context = staticmethod(save)  # type: ignore[method-assign]
    Gradient.backward = staticmethod(backward)  # type: ignore[method-assign]
    Gradient.__name__ = Gradient.__qualname__ = f"Gradient of {operator}"

    def call(*inputs: Any) -> Any:
        reverse = torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs)
        if reverse or forward_ad._current_level >= 0:  # in `dual_level` or `torch.func.jvp`
            with enable_single_level_autograd_function():
                return Gradient.apply(*inputs)  # type: ignore[attr-defined]
        return _below_autograd(operator, inputs)

    _LIBRARY.impl(operator._opname, call, "Autograd")


def _below_autograd(operator: torch._ops.OpOverload, inputs: tuple[Any, ...]) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*inputs)


def refuse_derivative(operator: torch._ops.OpOverload) -> None:
    """Make it an error to differentiate an operator; torch would only warn.

    Such are backward operators, and statistics whose derivative their user's gradient includes.
    """

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
