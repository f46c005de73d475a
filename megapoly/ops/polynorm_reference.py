"""PolyNorm on rows in plain PyTorch; every backend computes the same.

Powers overflow: in fp32, x^6 overflows from |x| = 2.6e6 on, and r_3 underflows in the backward pass
far earlier. So everything is computed in z = x / m, with a power of two m for each row:

    n(x^k) = z^k t_k,   t_k = (mean(z^2k) + eps / m^2k)^(-1/2) = r_k m^k

m is 1 for a row whose root mean square is below about 16, and scales larger ones to 8 .. 16.
Multiplication by a power of two is exact: where nothing overflows, m does not change a bit.
m follows from r_1, so the backward pass needs only the row's reciprocal roots.

Shapes: x, gate, grad_output, factor [rows, d / tp]; row values [rows, ..]. Everything per row is
fp32 (fp64 for fp64) except the sums of squares that ranks exchange, which are fp64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megapoly.ops.arguments import expand_to_rows, expert_of_row, sum_over_rows

# Ranks exchange sums of (x 2^-8)^2k in fp64: with order 4 and |x| up to 3.4e38 they stay below
# 2^984, and any sum that eps does not hide stays above the smallest fp64 number.
SQUARE_SUM_SHIFT = 2.0**-8
# r_1 is saved times 2^16: 1 / 3.4e38 would not be a normal fp32 number.
FIRST_ROOT_SHIFT = 2.0**16
# A row is scaled so that its largest element (statistics) or root mean square (m) is at most 16 to
# 32: z^8 and its sum over the width then stay far from both ends of fp32.
TARGET = 16.0


def upcast(x: Tensor) -> Tensor:
    """Convert ``x`` to the dtype of computation: fp32, or fp64 for fp64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def power_of_two(x: Tensor) -> Tensor:
    """Round x > 0 down to a power of two (its exponent bits; 0 if x is subnormal)."""
    if x.dtype == torch.float64:
        return (x.view(torch.int64) & 0x7FF0000000000000).view(torch.float64)
    return (x.view(torch.int32) & 0x7F800000).view(torch.float32)


def square_sums(x: Tensor, order: int) -> Tensor:
    """Compute sum_j (x_j 2^-8)^2k for k = 1 .. order: [rows, order] fp64, for a sum over ranks."""
    value = upcast(x)
    largest = value.abs().amax(-1, keepdim=True)
    scale = (power_of_two(largest) / TARGET).clamp(min=1.0)
    square = (value * (1.0 / scale)).square()
    power, sums = square, [square.sum(-1)]
    for _ in range(order - 1):
        power = power * square
        sums.append(power.sum(-1))
    unit = (scale.double() * SQUARE_SUM_SHIFT).square()
    return torch.stack(sums, dim=-1).double() * _powers(unit, order)


def rsqrt_of_square_sums(
    square_sums: Tensor, divisor: int, eps: float, dtype: torch.dtype
) -> Tensor:
    """Compute the reciprocal roots of each row: [r_1 2^16, t_2, .., t_order].

    Args:
        square_sums: [rows, order], summed over all ranks of the row.
        divisor: width of the whole row (L2 norm: 1).
        eps: added to a mean square.
        dtype: of the result.
    """
    order = square_sums.shape[-1]
    means = square_sums / divisor
    first = (means[:, :1] * SQUARE_SUM_SHIFT**-2 + eps).rsqrt() * FIRST_ROOT_SHIFT
    first = first.to(dtype)
    unit = _inverse_scale(first).double().square()
    roots = means * _powers(unit * SQUARE_SUM_SHIFT**-2, order) + eps * _powers(unit, order)
    return torch.cat([first, roots[:, 1:].rsqrt().to(dtype)], dim=-1)


def _powers(x: Tensor, order: int) -> Tensor:
    """Return x, x^2, .., x^order: [rows, 1] -> [rows, order]."""
    powers = [x]
    for _ in range(order - 1):
        powers.append(powers[-1] * x)
    return torch.cat(powers, dim=-1)


def _inverse_scale(first_root: Tensor) -> Tensor:
    """Return 1 / m from r_1 2^16."""
    return (power_of_two(first_root) * (TARGET / FIRST_ROOT_SHIFT)).clamp(max=1.0)


def _scale_and_roots(rsqrt: Tensor) -> tuple[Tensor, Tensor]:
    """Return 1 / m [rows, 1] and t_1 .. t_order [rows, order]."""
    first = rsqrt[:, :1]
    inverse = _inverse_scale(first)
    return inverse, torch.cat([first / FIRST_ROOT_SHIFT / inverse, rsqrt[:, 1:]], dim=-1)


def horner(x: Tensor, constants: Tensor) -> Tensor:
    """Evaluate constants[:, 0] + constants[:, 1] x + .. for each row."""
    y = constants[:, -1:]
    for k in range(constants.shape[-1] - 2, -1, -1):
        y = y * x + constants[:, k : k + 1]
    return y


def evaluate(
    x: Tensor,
    rsqrt: Tensor,
    coefficients: Tensor,
    probs: Tensor | None,
    factor: Tensor | None,
    offsets: Tensor | None,
) -> Tensor:
    """Compute p (a_0 + a_1 n(x) + ..) factor in the dtype of ``x``; 0 in padding rows."""
    expert = None if offsets is None else expert_of_row(offsets, x.shape[0])
    a = expand_to_rows(coefficients, expert, rsqrt.dtype)
    inverse, roots = _scale_and_roots(rsqrt)
    constants = torch.cat([a[:, :1].expand(x.shape[0], 1), a[:, 1:] * roots], dim=-1)
    if probs is not None:
        constants = constants * upcast(probs)[:, None]
    # One table, so that the compiled loop over a row only loads its entries.
    table = torch.cat([inverse, constants], dim=-1)
    y = horner(upcast(x) * table[:, :1], table[:, 1:])
    if factor is not None:
        y = y * upcast(factor)
    return zero_padding_rows(y, expert, coefficients).to(x.dtype)


def zero_padding_rows(x: Tensor, expert: Tensor | None, coefficients: Tensor) -> Tensor:
    """Set padding rows of ``x`` to zero; a product with 0 would keep NaN."""
    if expert is None:
        return x
    return torch.where((expert < coefficients.shape[0])[:, None], x, 0.0)


def gradient_sums(x: Tensor, rsqrt: Tensor, grad_output: Tensor, gate: Tensor | None) -> Tensor:
    """Compute sum_j g_j u_j z_j^k for k = 0 .. order: [rows, order + 1]."""
    order = rsqrt.shape[-1]
    g = gated_gradient(grad_output, gate)
    z = upcast(x) * _inverse_scale(rsqrt[:, :1])
    sums = [g.sum(-1)]
    for _ in range(order):
        g = g * z
        sums.append(g.sum(-1))
    return torch.stack(sums, dim=-1)


def gated_gradient(grad_output: Tensor, gate: Tensor | None) -> Tensor:
    """Return the product g u in the dtype of computation."""
    g = upcast(grad_output)
    return g if gate is None else g * upcast(gate)


def gradients(
    x: Tensor,
    rsqrt: Tensor,
    sums: Tensor,
    grad_output: Tensor,
    coefficients: Tensor,
    probs: Tensor | None,
    gate: Tensor | None,
    offsets: Tensor | None,
    divisor: int,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Compute gradients of x, coefficients and probs from ``gradient_sums`` over all ranks.

    T_k = t_k S_k,   A_k = p k a_k t_k,   B_k = A_k t_k T_k / d
    dx = (g (A_1 + A_2 z + ..) - z (B_1 + B_2 z^2 + ..)) / m
    da_k = sum_rows p T_k,   dp = a_0 G + sum_k a_k T_k
    """
    order = rsqrt.shape[-1]
    expert = None if offsets is None else expert_of_row(offsets, x.shape[0])
    a = expand_to_rows(coefficients, expert, rsqrt.dtype)
    inverse, roots = _scale_and_roots(rsqrt)
    terms = torch.cat([sums[:, :1], roots * sums[:, 1:]], dim=-1)  # G, T_1 .. T_r

    k = torch.arange(1, order + 1, dtype=rsqrt.dtype, device=x.device)
    direct = k * a[:, 1:] * roots  # A_k
    if probs is not None:
        direct = direct * upcast(probs)[:, None]
    through_norm = direct * roots * terms[:, 1:] / divisor  # B_k
    table = torch.cat([inverse, direct, through_norm], dim=-1)
    inverse, direct, through_norm = table.split([1, order, order], dim=-1)
    z = upcast(x) * inverse
    grad_x = gated_gradient(grad_output, gate) * horner(z, direct) - z * horner(z * z, through_norm)
    grad_x = zero_padding_rows(grad_x * inverse, expert, coefficients).to(x.dtype)

    terms = zero_padding_rows(terms, expert, coefficients)
    grad_probs = None
    if probs is not None:
        grad_probs = (a * terms).sum(-1).to(probs.dtype)
        terms = terms * upcast(probs)[:, None]
    grad_coefficients = sum_over_rows(terms, expert, coefficients.shape[0])
    return grad_x, grad_coefficients.to(coefficients.dtype), grad_probs


def forward(
    x: Tensor,
    coefficients: Tensor,
    probs: Tensor | None,
    gate: Tensor | None,
    offsets: Tensor | None,
    divisor: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Compute output and reciprocal roots of rows that are not split over ranks."""
    order = coefficients.shape[-1] - 1
    rsqrt = rsqrt_of_square_sums(square_sums(x, order), divisor, eps, upcast(x[:0]).dtype)
    return evaluate(x, rsqrt, coefficients, probs, gate, offsets), rsqrt


def backward(
    x: Tensor,
    rsqrt: Tensor,
    grad_output: Tensor,
    coefficients: Tensor,
    probs: Tensor | None,
    gate: Tensor | None,
    offsets: Tensor | None,
    divisor: int,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Compute gradients of x, coefficients, probs and gate of rows that are not split."""
    sums = gradient_sums(x, rsqrt, grad_output, gate)
    grads = gradients(x, rsqrt, sums, grad_output, coefficients, probs, gate, offsets, divisor)
    grad_gate = None
    if gate is not None:
        grad_gate = evaluate(x, rsqrt, coefficients, probs, grad_output, offsets)
    return *grads, grad_gate
