"""PolyNorm: a polynomial whose powers are each normalised over the FFN width."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import Function, once_differentiable

from megapoly.ops.backends import Backend, row_function
from megapoly.ops.collectives import all_reduce_sum
from megapoly.ops.rows import check_shapes, expert_of_row


def polynorm(
    x: Tensor,
    coefficients: Tensor,
    *,
    eps: float = 1e-6,
    norm: Literal["rms", "l2"] = "rms",
    group: dist.ProcessGroup | None = None,
    offsets: Tensor | None = None,
    probs: Tensor | None = None,
    gate: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Weighted sum of normalised powers of ``x`` over the whole FFN width.

        y = p (a0 + a1 n(x) + a2 n(x^2) + .. + ar n(x^r)) u,   n(v) = v / sqrt(mean(v^2) + eps)

    With ``norm="l2"`` the mean is a sum. The backward pass is the closed form

        S_k = sum_j g_j x_j^k,   T_k = r_k S_k,   A_k = p k a_k r_k,   B_k = A_k r_k T_k / d
        dx = g (A_1 + A_2 x + ..) - x (B_1 + B_2 x^2 + ..),   da_k = sum_rows p T_k

    in which r_k is the reciprocal root of the k-th mean square, and d the width (``l2``: 1).

    Source: PolyCom (ICLR 2025), Eq. 3, with the released code's root mean square.

    Args:
        x: [..., d / tp]; any floating dtype.
        coefficients: [r + 1], ascending powers, or [experts, r + 1] with ``offsets``.
        eps: added to the mean square (``l2``: to the sum of squares).
        norm: what divides a power: its root mean square, or its L2 norm.
        group: ranks that share one row, all with equally many columns; statistics are over all of
            their columns. One all-reduce forward and one backward, of r and r + 1 numbers a row.
        offsets: [experts + 1] integers for rows sorted by expert; ``x`` is then [rows, d / tp].
        probs: p, one a row (the router probability).
        gate: u, the shape of ``x`` (the gated form).
        backend: ``reference`` runs the code below as written, ``compiled`` through torch.compile,
            ``auto`` takes ``compiled`` where there is a compiler.

    Returns:
        [..., d / tp] in the dtype of ``x``; statistics and sums are fp32 (fp64 for fp64).

    Raises:
        ShapeError: the arguments do not fit together.
        UnavailableError: ``compiled`` was asked for and there is no compiler.

    Note:
        Gradients of ``coefficients`` and ``probs`` are complete and equal on every rank of
        ``group``: they come from sums that the backward pass has already reduced.
    """
    check_shapes(x, coefficients, offsets, probs, gate)
    rows = x.reshape(-1, x.shape[-1])
    gate_rows = None if gate is None else gate.reshape(rows.shape)
    prob_rows = None if probs is None else probs.reshape(-1)
    context = _Context(eps, norm == "rms", group, backend)
    return _PolyNorm.apply(rows, coefficients, prob_rows, gate_rows, offsets, context).view(x.shape)


class _Context(NamedTuple):
    eps: float
    is_rms: bool
    group: dist.ProcessGroup | None
    backend: Backend


class _PolyNorm(Function):
    """The operator on [rows, d / tp]; row functions below, collectives here."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        coefficients: Tensor,
        probs: Tensor | None,
        gate: Tensor | None,
        offsets: Tensor | None,
        context: _Context,
    ) -> Tensor:
        num_ranks = 1 if context.group is None else context.group.size()
        divisor = x.shape[-1] * num_ranks if context.is_rms else 1
        sums = _SQUARE_SUMS[coefficients.shape[-1] - 1](x, backend=context.backend)  # [rows, r]
        rsqrt = (all_reduce_sum(sums, context.group) / divisor + context.eps).rsqrt()
        a, p, _ = _per_row(coefficients, probs, offsets, x)
        constants = torch.cat([a[:, :1].expand(len(x), 1), a[:, 1:] * rsqrt], dim=-1)
        y = _apply_polynomial(
            x, constants if p is None else p * constants, gate, backend=context.backend
        )
        ctx.save_for_backward(x, coefficients, rsqrt, probs, gate, offsets)
        ctx.context, ctx.divisor = context, divisor
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, coefficients, rsqrt, probs, gate, offsets = ctx.saved_tensors
        group, backend = ctx.context.group, ctx.context.backend
        order = rsqrt.shape[-1]
        grad_output = grad_outputs[0]
        a, p, expert = _per_row(coefficients, probs, offsets, x)
        sums = _GRADIENT_SUMS[order](x, grad_output, gate, backend=backend)  # [rows, r + 1]
        all_reduce_sum(sums, group)
        normalised_sums = torch.cat([sums[:, :1], rsqrt * sums[:, 1:]], dim=-1)  # G, T_1 .. T_r

        k = torch.arange(1, order + 1, dtype=rsqrt.dtype, device=x.device)
        direct = k * a[:, 1:] * rsqrt  # A_k
        direct = direct if p is None else p * direct
        through_norm = direct * rsqrt * normalised_sums[:, 1:] / -ctx.divisor  # -B_k
        grad_x = _input_gradient(x, grad_output, gate, direct, through_norm, backend=backend)

        grad_gate = None
        if gate is not None:
            constants = torch.cat([a[:, :1].expand(len(x), 1), a[:, 1:] * rsqrt], dim=-1)
            constants = constants if p is None else p * constants
            grad_gate = _apply_polynomial(x, constants, grad_output, backend=backend)
        grad_probs = None
        if p is not None:
            grad_probs = (a * normalised_sums).sum(-1).to(probs.dtype)
            normalised_sums = p * normalised_sums
        if expert is None:
            grad_coefficients = normalised_sums.sum(0)
        else:
            grad_coefficients = normalised_sums.new_zeros(coefficients.shape)
            grad_coefficients.index_add_(0, expert, normalised_sums)
        grad_coefficients = grad_coefficients.to(coefficients.dtype)
        return grad_x, grad_coefficients, grad_probs, grad_gate, None, None


def _per_row(
    coefficients: Tensor, probs: Tensor | None, offsets: Tensor | None, x: Tensor
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Coefficients [rows or 1, r + 1], probability [rows, 1] and expert [rows] of each row."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    expert = None if offsets is None else expert_of_row(offsets, x.shape[0])
    a = coefficients.to(dtype)[None] if expert is None else coefficients.to(dtype)[expert]
    return a, None if probs is None else probs.to(dtype)[:, None], expert


def _wide(x: Tensor) -> Tensor:
    """``x`` in the dtype that is computed in: fp32, or fp64 for fp64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _powers(x: Tensor, order: int) -> list[Tensor]:
    """x, x^2, .., x^order."""
    powers = [_wide(x)]
    for _ in range(order - 1):
        powers.append(powers[-1] * powers[0])
    return powers


def _horner(x: Tensor, constants: Tensor) -> Tensor:
    """constants[:, 0] + constants[:, 1] x + .. for each row."""
    y = constants[:, -1:]
    for k in range(constants.shape[-1] - 2, -1, -1):
        y = y * x + constants[:, k : k + 1]
    return y


def _square_sums(x: Tensor, order: int) -> Tensor:
    """sum_j x_j^{2k} for k = 1 .. order: [rows, order]."""
    return torch.stack([(power * power).sum(-1) for power in _powers(x, order)], dim=-1)


def _gradient_sums(x: Tensor, grad_output: Tensor, gate: Tensor | None, order: int) -> Tensor:
    """sum_j g_j u_j x_j^k for k = 0 .. order: [rows, order + 1]."""
    g = _wide(grad_output) if gate is None else _wide(grad_output) * gate
    return torch.stack([g.sum(-1), *((g * power).sum(-1) for power in _powers(x, order))], dim=-1)


@row_function
def _apply_polynomial(x: Tensor, constants: Tensor, factor: Tensor | None) -> Tensor:
    """(c_0 + c_1 x + .. + c_r x^r) factor, in the dtype of ``x``."""
    y = _horner(_wide(x), constants)
    return (y if factor is None else y * factor).to(x.dtype)


@row_function
def _input_gradient(
    x: Tensor, grad_output: Tensor, gate: Tensor | None, direct: Tensor, through_norm: Tensor
) -> Tensor:
    """G (A_1 + A_2 x + ..) - x (B_1 + B_2 x^2 + ..), in the dtype of ``x``."""
    value = _wide(x)
    g = _wide(grad_output) if gate is None else _wide(grad_output) * gate
    y = g * _horner(value, direct) + value * _horner(value * value, through_norm)
    return y.to(x.dtype)


def _square_sums_of_order(order: int) -> Any:
    return row_function(lambda x: _square_sums(x, order))


def _gradient_sums_of_order(order: int) -> Any:
    return row_function(lambda x, g, gate: _gradient_sums(x, g, gate, order))


_ORDERS = (1, 2, 3, 4)
_SQUARE_SUMS = {order: _square_sums_of_order(order) for order in _ORDERS}
_GRADIENT_SUMS = {order: _gradient_sums_of_order(order) for order in _ORDERS}
