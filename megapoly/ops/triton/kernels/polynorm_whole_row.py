"""PolyNorm kernels for rows that one program holds whole: every element is read once.

One program holds one row in registers: a block of a power of two and a masked tail. The formulas
are those of :mod:`megapoly.ops.polynorm_reference`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megapoly.ops.triton.kernels.polynomial import (
    FIRST_ROOT_SHIFT,
    SAFE_SUM,
    first_true_root,
    horner,
    inverse_power_of_two,
    inverse_scale,
    largest_of,
    load_roots,
    load_set,
    scale_of_largest,
    square_sums,
    store_set,
    weighted_sums,
)
from megapoly.ops.triton.kernels.tiles import (
    aligned,
    load_block,
    load_of_row,
    load_prob,
    load_tail,
    set_of_row,
    store_block,
    store_tail,
)


@triton.jit
def forward_kernel(
    x_ptr,
    gate_ptr,
    coefficients_ptr,
    probs_ptr,
    expert_ptr,
    y_ptr,
    rsqrt_ptr,
    x_stride,
    gate_stride,
    width,
    num_experts,
    inverse_divisor,
    eps,
    ORDER: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
    TAIL: tl.constexpr,
    HAS_GATE: tl.constexpr,
    HAS_PROBS: tl.constexpr,
    HAS_EXPERTS: tl.constexpr,
):
    """Compute p (a_0 + a_1 n(x) + ..) u and the reciprocal roots of the row."""
    row = tl.program_id(0).to(tl.int64)
    x_stride = aligned(x_stride, ALIGN)
    gate_stride = aligned(gate_stride, ALIGN)
    width = aligned(width, ALIGN)
    expert, is_row = set_of_row(expert_ptr, row, num_experts, HAS_EXPERTS)
    x_row = x_ptr + row * x_stride
    columns = tl.arange(0, BLOCK)
    x = load_block(x_row, columns, is_row, HAS_EXPERTS)
    q1, q2, q3, q4 = square_sums(x, ORDER)
    if TAIL > 0:
        tail_columns = BLOCK + tl.arange(0, TAIL)
        x_tail = load_tail(x_row, tail_columns, width, is_row, HAS_EXPERTS)
        t1, t2, t3, t4 = square_sums(x_tail, ORDER)
        q1, q2, q3, q4 = q1 + t1, q2 + t2, q3 + t3, q4 + t4

    # Sums that overflow or nearly do are computed again, with the largest element scaled below 32.
    scale = tl.full((), 1.0, tl.float32)
    if not (largest_of(q1, q2, q3, q4, ORDER) < SAFE_SUM):
        largest = tl.max(tl.abs(x))
        if TAIL > 0:
            largest = tl.maximum(largest, tl.max(tl.abs(x_tail)))
        scale = scale_of_largest(largest)
        q1, q2, q3, q4 = square_sums(x * inverse_power_of_two(scale), ORDER)
        if TAIL > 0:
            t1, t2, t3, t4 = square_sums(x_tail * inverse_power_of_two(scale), ORDER)
            q1, q2, q3, q4 = q1 + t1, q2 + t2, q3 + t3, q4 + t4

    # r_1, then m from it; the scale of the sums and m differ by a power of two.
    inverse_local = inverse_power_of_two(scale)
    first = tl.rsqrt(q1 * inverse_divisor + eps * inverse_local * inverse_local)
    first = first * (inverse_local * FIRST_ROOT_SHIFT)
    inverse = inverse_scale(first)
    ratio = (inverse * scale) * (inverse * scale)
    unit = inverse * inverse
    r1 = first_true_root(first, inverse)
    r2 = tl.rsqrt(q2 * inverse_divisor * (ratio * ratio) + eps * (unit * unit))
    r3 = tl.rsqrt(q3 * inverse_divisor * (ratio * ratio * ratio) + eps * (unit * unit * unit))
    r4 = tl.rsqrt(
        q4 * inverse_divisor * (ratio * ratio * ratio * ratio) + eps * (unit * unit * unit * unit)
    )
    rsqrt_row = rsqrt_ptr + row * ORDER
    tl.store(rsqrt_row, first)
    tl.store(rsqrt_row + 1, r2)
    if ORDER >= 3:
        tl.store(rsqrt_row + 2, r3)
    if ORDER >= 4:
        tl.store(rsqrt_row + 3, r4)

    a0, a1, a2, a3, a4 = load_set(
        coefficients_ptr + expert * (ORDER + 1), is_row, ORDER, HAS_EXPERTS
    )
    p = load_prob(probs_ptr, row, is_row, HAS_PROBS, HAS_EXPERTS)
    c0, c1, c2, c3, c4 = p * a0, p * a1 * r1, p * a2 * r2, p * a3 * r3, p * a4 * r4
    y = horner(x * inverse, c0, c1, c2, c3, c4, ORDER)
    if HAS_GATE:
        y = y * load_block(gate_ptr + row * gate_stride, columns, is_row, HAS_EXPERTS)
    y_row = y_ptr + row * width
    store_block(y_row, columns, y)
    if TAIL > 0:
        y_tail = horner(x_tail * inverse, c0, c1, c2, c3, c4, ORDER)
        if HAS_GATE:
            gate_row = gate_ptr + row * gate_stride
            y_tail = y_tail * load_tail(gate_row, tail_columns, width, is_row, HAS_EXPERTS)
        store_tail(y_row, tail_columns, width, y_tail)


@triton.jit
def gradient_constants(
    rsqrt_ptr,
    coefficients_ptr,
    row,
    expert,
    p,
    s0,
    s1,
    s2,
    s3,
    s4,
    inverse_divisor,
    is_row,
    ORDER: tl.constexpr,
    HAS_EXPERTS: tl.constexpr,
):
    """Return 1 / m, t_k, T_k, A_k, B_k and the gradient of the probability of one row."""
    inverse, r1, r2, r3, r4 = load_roots(rsqrt_ptr + row * ORDER, is_row, ORDER, HAS_EXPERTS)
    a0, a1, a2, a3, a4 = load_set(
        coefficients_ptr + expert * (ORDER + 1), is_row, ORDER, HAS_EXPERTS
    )
    t1, t2, t3, t4 = r1 * s1, r2 * s2, r3 * s3, r4 * s4
    grad_prob = a0 * s0 + a1 * t1 + a2 * t2 + a3 * t3 + a4 * t4
    direct = (p * a1 * r1, 2.0 * p * a2 * r2, 3.0 * p * a3 * r3, 4.0 * p * a4 * r4)
    through_norm = (
        direct[0] * r1 * t1 * inverse_divisor,
        direct[1] * r2 * t2 * inverse_divisor,
        direct[2] * r3 * t3 * inverse_divisor,
        direct[3] * r4 * t4 * inverse_divisor,
    )
    evaluation = (p * a0, p * a1 * r1, p * a2 * r2, p * a3 * r3, p * a4 * r4)
    return inverse, (t1, t2, t3, t4), direct, through_norm, evaluation, grad_prob


@triton.jit
def input_gradient(z, g, direct, through_norm, inverse, ORDER: tl.constexpr):
    """Return (g (A_1 + A_2 z + ..) - z (B_1 + B_2 z^2 + ..)) / m."""
    through = horner(z, direct[0], direct[1], direct[2], direct[3], 0.0, ORDER - 1)
    norm = horner(
        z * z, through_norm[0], through_norm[1], through_norm[2], through_norm[3], 0.0, ORDER - 1
    )
    return (g * through - z * norm) * inverse


@triton.jit
def backward_kernel(
    grad_output_ptr,
    x_ptr,
    rsqrt_ptr,
    gate_ptr,
    coefficients_ptr,
    probs_ptr,
    expert_ptr,
    grad_x_ptr,
    grad_gate_ptr,
    grad_probs_ptr,
    terms_ptr,
    grad_output_stride,
    x_stride,
    gate_stride,
    width,
    num_experts,
    inverse_divisor,
    ORDER: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
    TAIL: tl.constexpr,
    HAS_GATE: tl.constexpr,
    HAS_PROBS: tl.constexpr,
    HAS_EXPERTS: tl.constexpr,
):
    """Compute gradients of x, gate and probs, and the row's terms for the coefficients."""
    row = tl.program_id(0).to(tl.int64)
    x_stride = aligned(x_stride, ALIGN)
    gate_stride = aligned(gate_stride, ALIGN)
    grad_output_stride = aligned(grad_output_stride, ALIGN)
    width = aligned(width, ALIGN)
    expert, is_row = set_of_row(expert_ptr, row, num_experts, HAS_EXPERTS)
    first = load_of_row(rsqrt_ptr + row * ORDER, is_row, 1.0, HAS_EXPERTS)
    inverse = inverse_scale(first)
    columns = tl.arange(0, BLOCK)
    x_row = x_ptr + row * x_stride
    grad_row = grad_output_ptr + row * grad_output_stride
    if HAS_GATE:
        gate_row = gate_ptr + row * gate_stride
    z = load_block(x_row, columns, is_row, HAS_EXPERTS) * inverse
    grad = load_block(grad_row, columns, is_row, HAS_EXPERTS)
    g = grad
    if HAS_GATE:
        g = grad * load_block(gate_row, columns, is_row, HAS_EXPERTS)
    s0, s1, s2, s3, s4 = weighted_sums(z, g, ORDER)
    if TAIL > 0:
        tail_columns = BLOCK + tl.arange(0, TAIL)
        z_tail = load_tail(x_row, tail_columns, width, is_row, HAS_EXPERTS) * inverse
        grad_tail = load_tail(grad_row, tail_columns, width, is_row, HAS_EXPERTS)
        g_tail = grad_tail
        if HAS_GATE:
            g_tail = grad_tail * load_tail(gate_row, tail_columns, width, is_row, HAS_EXPERTS)
        u0, u1, u2, u3, u4 = weighted_sums(z_tail, g_tail, ORDER)
        s0, s1, s2, s3, s4 = s0 + u0, s1 + u1, s2 + u2, s3 + u3, s4 + u4

    p = load_prob(probs_ptr, row, is_row, HAS_PROBS, HAS_EXPERTS)
    inverse, t, direct, through_norm, evaluation, grad_prob = gradient_constants(
        rsqrt_ptr,
        coefficients_ptr,
        row,
        expert,
        p,
        s0,
        s1,
        s2,
        s3,
        s4,
        inverse_divisor,
        is_row,
        ORDER,
        HAS_EXPERTS,
    )
    if HAS_PROBS:
        tl.store(grad_probs_ptr + row, grad_prob)
    store_set(terms_ptr + row * (ORDER + 1), p * s0, p * t[0], p * t[1], p * t[2], p * t[3], ORDER)
    grad_x_row = grad_x_ptr + row * width
    store_block(grad_x_row, columns, input_gradient(z, g, direct, through_norm, inverse, ORDER))
    if TAIL > 0:
        grad_x_tail = input_gradient(z_tail, g_tail, direct, through_norm, inverse, ORDER)
        store_tail(grad_x_row, tail_columns, width, grad_x_tail)
    if HAS_GATE:
        e = evaluation
        grad_gate_row = grad_gate_ptr + row * width
        grad_gate = grad * horner(z, e[0], e[1], e[2], e[3], e[4], ORDER)
        store_block(grad_gate_row, columns, grad_gate)
        if TAIL > 0:
            grad_gate = grad_tail * horner(z_tail, e[0], e[1], e[2], e[3], e[4], ORDER)
            store_tail(grad_gate_row, tail_columns, width, grad_gate)
