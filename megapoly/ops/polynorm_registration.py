"""PolyNorm's operators in ``torch.ops.megapoly``: forward, its two halves, backward.

Rows that are not split over ranks take one forward operator. Split rows take two:
``polynorm_rsqrt`` contains the collective and ``polynorm_evaluate`` is pointwise, so that
recomputation repeats only the latter (see :func:`megapoly.ops.save_row_statistics`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megapoly.ops import polynorm_reference
from megapoly.ops.arguments import row_major
from megapoly.ops.backends import load_functions, resolve_backend
from megapoly.ops.collectives import PendingSum, check_segments, segments, size_of
from megapoly.ops.library import (
    absent,
    differentiate,
    operator,
    or_absent,
    present,
    refuse_derivative,
)
from megapoly.polynomial import Backend

_ROWS = "Tensor coefficients, Tensor? probs, Tensor? gate, Tensor? offsets"
_LAYOUT = "int divisor, str group, bool deterministic, str backend"


@dataclass(frozen=True)
class PolyNormFunctions:
    """One backend; each function is the one of that name in :mod:`.polynorm_reference`.

    Args:
        forward: of rows that are not split over ranks.
        backward: of the same rows.
        square_sums: from a part of each row; ranks add them up.
        rsqrt_of_square_sums: reciprocal roots from the sums over all ranks.
        evaluate: the polynomial, pointwise.
        gradient_sums: from a part of each row; ranks add them up.
        gradients: from the sums over all ranks, pointwise.
    """

    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor | None, Tensor | None]]
    square_sums: Callable[[Tensor, int], Tensor]
    rsqrt_of_square_sums: Callable[[Tensor, int, float, torch.dtype], Tensor]
    evaluate: Callable[..., Tensor]
    gradient_sums: Callable[..., Tensor]
    gradients: Callable[..., tuple[Tensor, Tensor, Tensor | None]]


def functions_for(backend: Backend, x: Tensor) -> PolyNormFunctions:
    """Return the functions that run on the device and dtype of ``x``."""
    return _functions(resolve_backend(backend, x.device.type, x.dtype))


@functools.cache
def _functions(backend: str) -> PolyNormFunctions:
    kernels = "megapoly.ops.triton.polynorm_launch"
    return load_functions(PolyNormFunctions, backend, polynorm_reference, kernels)


def _rsqrt_like(x: Tensor, order: int) -> Tensor:
    return x.new_empty(x.shape[0], order, dtype=torch.promote_types(x.dtype, torch.float32))


def _fake_forward(x: Tensor, coefficients: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), _rsqrt_like(x, coefficients.shape[-1] - 1)


@operator(
    f"polynorm_forward(Tensor x, {_ROWS}, float eps, int divisor, str backend) -> (Tensor, Tensor)",
    fake=_fake_forward,
)
def polynorm_forward(
    x: Tensor,
    coefficients: Tensor,
    probs: Tensor | None,
    gate: Tensor | None,
    offsets: Tensor | None,
    eps: float,
    divisor: int,
    backend: Backend,
) -> tuple[Tensor, Tensor]:
    """Compute output and reciprocal roots of rows that are not split."""
    return functions_for(backend, x).forward(x, coefficients, probs, gate, offsets, divisor, eps)


def _fake_rsqrt(x: Tensor, order: int, *others: Any) -> Tensor:
    return _rsqrt_like(x, order)


@operator(
    f"polynorm_rsqrt(Tensor x, int order, float eps, {_LAYOUT}) -> Tensor",
    fake=_fake_rsqrt,
)
def polynorm_rsqrt(
    x: Tensor,
    order: int,
    eps: float,
    divisor: int,
    group: str,
    deterministic: bool,
    backend: Backend,
) -> Tensor:
    """Compute reciprocal roots of rows that are split over ranks, with one collective."""
    functions = functions_for(backend, x)
    if deterministic:
        num_ranks = size_of(group)
        check_segments(x.shape[-1], num_ranks)
        sums = torch.stack([functions.square_sums(part, order) for part in segments(x, num_ranks)])
    else:
        sums = functions.square_sums(x, order)
    sums = PendingSum(sums, group, deterministic=deterministic).wait()
    return functions.rsqrt_of_square_sums(
        sums, divisor, eps, torch.promote_types(x.dtype, torch.float32)
    )


def _fake_evaluate(x: Tensor, *others: Any) -> Tensor:
    return x.new_empty(x.shape)


@operator(
    f"polynorm_evaluate(Tensor x, Tensor rsqrt, {_ROWS}, {_LAYOUT}) -> Tensor",
    fake=_fake_evaluate,
)
def polynorm_evaluate(
    x: Tensor,
    rsqrt: Tensor,
    coefficients: Tensor,
    probs: Tensor | None,
    gate: Tensor | None,
    offsets: Tensor | None,
    divisor: int,
    group: str,
    deterministic: bool,
    backend: Backend,
) -> Tensor:
    """Compute the output from x and its reciprocal roots; the backward pass uses the layout."""
    return functions_for(backend, x).evaluate(x, rsqrt, coefficients, probs, gate, offsets)


def _fake_backward(
    grad_output: Tensor,
    x: Tensor,
    rsqrt: Tensor,
    coefficients: Tensor,
    probs: Tensor | None,
    gate: Tensor | None,
    *others: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape),
        torch.empty_like(coefficients),
        absent(x) if probs is None else probs.new_empty(probs.shape),
        absent(x) if gate is None else gate.new_empty(gate.shape),
    )


@operator(
    f"polynorm_backward(Tensor grad_output, Tensor x, Tensor rsqrt, {_ROWS}, {_LAYOUT})"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_fake_backward,
)
def polynorm_backward(
    grad_output: Tensor,
    x: Tensor,
    rsqrt: Tensor,
    coefficients: Tensor,
    probs: Tensor | None,
    gate: Tensor | None,
    offsets: Tensor | None,
    divisor: int,
    group: str,
    deterministic: bool,
    backend: Backend,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute gradients of x, coefficients, probs and gate; of split rows with one collective."""
    functions = functions_for(backend, x)
    grad_output = row_major(grad_output)
    given = (coefficients, probs, gate, offsets)
    grad_gate: Tensor | None = None
    if not group and not deterministic:
        grad_x, grad_coefficients, grad_probs, grad_gate = functions.backward(
            x, rsqrt, grad_output, *given, divisor
        )
    else:
        pending = PendingSum(
            _gradient_sums(x, rsqrt, grad_output, gate, group, deterministic, backend),
            group,
            deterministic=deterministic,
        )
        if gate is not None:  # needs no sum, so it overlaps with the collective
            grad_gate = functions.evaluate(x, rsqrt, coefficients, probs, grad_output, offsets)
        grad_x, grad_coefficients, grad_probs = functions.gradients(
            x, rsqrt, pending.wait(), grad_output, *given, divisor
        )
    return grad_x, grad_coefficients, or_absent(grad_probs, x), or_absent(grad_gate, x)


def _gradient_sums(
    x: Tensor,
    rsqrt: Tensor,
    grad_output: Tensor,
    gate: Tensor | None,
    group: str,
    deterministic: bool,
    backend: Backend,
) -> Tensor:
    functions = functions_for(backend, x)
    if not deterministic:
        return functions.gradient_sums(x, rsqrt, grad_output, gate)
    num_ranks = size_of(group)
    parts = [segments(tensor, num_ranks) for tensor in (x, grad_output)]
    gates = [None] * len(parts[0]) if gate is None else segments(gate, num_ranks)
    return torch.stack(
        [functions.gradient_sums(x, rsqrt, g, u) for x, g, u in zip(*parts, gates, strict=True)]
    )


def _save_forward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, coefficients, probs, gate, offsets, _, divisor, backend = inputs
    ctx.save_for_backward(x, output[1], coefficients, probs, gate, offsets)
    ctx.layout = (divisor, "", False, backend)


def _save_evaluate(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:6])
    ctx.layout = inputs[6:]


def _gradients(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    grads = polynorm_backward(grad_output, *ctx.saved_tensors, *ctx.layout)
    grad_x, grad_coefficients, grad_probs, grad_gate = grads
    return grad_x, grad_coefficients, present(grad_probs), present(grad_gate)


def _backward_of_forward(
    ctx: Any, grad_output: Tensor, grad_rsqrt: Tensor | None
) -> tuple[Tensor | None, ...]:
    return *_gradients(ctx, grad_output), *(None,) * 4


def _backward_of_evaluate(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    # The gradient of x includes the path through the reciprocal roots.
    grad_x, *others = _gradients(ctx, grad_output)
    return grad_x, None, *others, *(None,) * 5


refuse_derivative(polynorm_rsqrt)
refuse_derivative(polynorm_backward)
differentiate(polynorm_forward, save=_save_forward, backward=_backward_of_forward)
differentiate(polynorm_evaluate, save=_save_evaluate, backward=_backward_of_evaluate)
