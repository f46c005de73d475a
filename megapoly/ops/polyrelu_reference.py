"""PolyReLU on rows in plain PyTorch; every backend computes the same.

Shapes are as in :mod:`megapoly.ops.polynorm_reference`; ``slope`` is [1] or [experts, 1], or
None for 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megapoly.ops.arguments import expand_to_rows, expert_of_row, sum_over_rows
from megapoly.ops.polynorm_reference import gated_gradient, horner, upcast, zero_padding_rows


def forward(
    x: Tensor,
    coefficients: Tensor,
    slope: Tensor | None,
    probs: Tensor | None,
    gate: Tensor | None,
    offsets: Tensor | None,
) -> Tensor:
    """Compute p (a_0 + a_1 h + .. + a_r h^r) u in the dtype of ``x``; 0 in padding rows."""
    expert = None if offsets is None else expert_of_row(offsets, x.shape[0])
    value = upcast(x)
    a = expand_to_rows(coefficients, expert, value.dtype)
    y = horner(_rectified(value, slope, expert), a)
    if probs is not None:
        y = y * upcast(probs)[:, None]
    if gate is not None:
        y = y * upcast(gate)
    return zero_padding_rows(y, expert, coefficients).to(x.dtype)


def _rectified(value: Tensor, slope: Tensor | None, expert: Tensor | None) -> Tensor:
    """Return h = max(x, 0) + slope min(x, 0)."""
    if slope is None:
        return value.relu()
    return torch.where(value > 0, value, value * expand_to_rows(slope, expert, value.dtype))


def backward(
    x: Tensor,
    grad_output: Tensor,
    coefficients: Tensor,
    slope: Tensor | None,
    probs: Tensor | None,
    gate: Tensor | None,
    offsets: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Compute gradients of x, coefficients, slope, probs and gate.

        S_k = sum_j g_j u_j h_j^k,   da_k = sum_rows p S_k,   dp = sum_k a_k S_k
        dx = p g u P'(h) (1 where x > 0, else slope)
        dslope = sum_rows p sum_j g u P'(h) min(x, 0)

    Gradients of coefficients and slope are fp64, of probs in the dtype of computation.
    They are partial sums if ``x`` is a part of each row.
    """
    expert = None if offsets is None else expert_of_row(offsets, x.shape[0])
    value = upcast(x)
    a = expand_to_rows(coefficients, expert, value.dtype)
    h = _rectified(value, slope, expert)
    g = gated_gradient(grad_output, gate)
    k = torch.arange(1, a.shape[-1], dtype=a.dtype, device=x.device)
    through = g * horner(h, k * a[:, 1:])  # g u P'(h)
    below = 0.0 if slope is None else expand_to_rows(slope, expert, value.dtype)
    p = 1.0 if probs is None else upcast(probs)[:, None]
    grad_x = zero_padding_rows(through * torch.where(value > 0, p, below * p), expert, coefficients)

    terms, power = [g.sum(-1)], g
    for _ in range(a.shape[-1] - 1):
        power = power * h
        terms.append(power.sum(-1))
    sums = zero_padding_rows(torch.stack(terms, dim=-1), expert, coefficients)
    num_experts = coefficients.shape[0]
    grad_coefficients = sum_over_rows(sums * p, expert, num_experts)
    grad_slope = None
    if slope is not None:
        negative = (through * value.clamp(max=0.0)).sum(-1, keepdim=True) * p
        grad_slope = sum_over_rows(negative, expert, num_experts)
    grad_probs = None if probs is None else (a * sums).sum(-1)
    grad_gate = None
    if gate is not None:
        grad_gate = zero_padding_rows(upcast(grad_output) * horner(h, a) * p, expert, coefficients)
        grad_gate = grad_gate.to(gate.dtype)
    return grad_x.to(x.dtype), grad_coefficients, grad_slope, grad_probs, grad_gate
