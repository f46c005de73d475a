"""PolyNorm's operators in ``torch.ops.megapoly``: forward, its two halves, backward.

A row that one rank holds whole takes one forward operator. A row that is cut over ranks takes two:
``polynorm_rsqrt`` holds the collective, ``polynorm_evaluate`` is pointwise, so that recomputing
activations repeats only the latter (see :func:`megapoly.ops.save_row_statistics`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megapoly.ops.arguments import row_major
from megapoly.ops.backends import Backend
from megapoly.ops.collectives import PendingSum, check_segments, segments, size_of
from megapoly.ops.library import (
    absent,
    differentiate,
    operator,
    or_absent,
    present,
    refuse_second_derivative,
)
from megapoly.ops.polynorm_backends import rows_of

_ROWS = "Tensor coefficients, Tensor? probs, Tensor? gate, Tensor? offsets"
_LAYOUT = "int divisor, str group, bool deterministic, str backend"


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
    """Output and reciprocal roots of whole rows."""
    return rows_of(backend, x).forward(x, coefficients, probs, gate, offsets, divisor, eps)


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
    """Reciprocal roots of rows of which this rank holds a part: the forward collective."""
    rows = rows_of(backend, x)
    if deterministic:
        num_ranks = size_of(group)
        check_segments(x.shape[-1], num_ranks)
        sums = torch.stack([rows.moments(part, order) for part in segments(x, num_ranks)])
    else:
        sums = rows.moments(x, order)
    sums = PendingSum(sums, group, deterministic=deterministic).wait()
    return rows.rsqrt_of_moments(sums, divisor, eps, torch.promote_types(x.dtype, torch.float32))


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
    """Output from x and its reciprocal roots; layout and divisor are for the backward pass."""
    return rows_of(backend, x).evaluate(x, rsqrt, coefficients, probs, gate, offsets)


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
    """Gradients of x, coefficients, probs and gate: the backward collective."""
    rows = rows_of(backend, x)
    grad_output = row_major(grad_output)
    given = (coefficients, probs, gate, offsets)
    grad_gate: Tensor | None = None
    if not group and not deterministic:
        grad_x, grad_coefficients, grad_probs, grad_gate = rows.backward(
            x, rsqrt, grad_output, *given, divisor
        )
    else:
        pending = PendingSum(
            _gradient_sums(x, rsqrt, grad_output, gate, group, deterministic, backend),
            group,
            deterministic=deterministic,
        )
        if gate is not None:  # needs no sum: it runs while the ranks exchange theirs
            grad_gate = rows.evaluate(x, rsqrt, coefficients, probs, grad_output, offsets)
        grad_x, grad_coefficients, grad_probs = rows.gradients(
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
    rows = rows_of(backend, x)
    if not deterministic:
        return rows.gradient_sums(x, rsqrt, grad_output, gate)
    num_ranks = size_of(group)
    parts = [segments(tensor, num_ranks) for tensor in (x, grad_output)]
    gates = [None] * len(parts[0]) if gate is None else segments(gate, num_ranks)
    return torch.stack(
        [rows.gradient_sums(x, rsqrt, g, u) for x, g, u in zip(*parts, gates, strict=True)]
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
    # The whole gradient of x, its way through the reciprocal roots included.
    grad_x, *others = _gradients(ctx, grad_output)
    return grad_x, None, *others, *(None,) * 5


refuse_second_derivative(polynorm_backward)
differentiate(polynorm_forward, save=_save_forward, backward=_backward_of_forward)
differentiate(polynorm_evaluate, save=_save_evaluate, backward=_backward_of_evaluate)
