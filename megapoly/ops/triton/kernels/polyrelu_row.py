"""PolyReLU kernels: one program processes one row, in blocks and a masked tail.

The formulas are those of :mod:`megapoly.ops.polyrelu_reference`. Only the gradients of
coefficients, slope and probs are sums over a row, so every element is read once at any width.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megapoly.ops.triton.kernels.polynomial import (
    add_weighted,
    horner,
    load_set,
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
def rectified(x, slope, HAS_SLOPE: tl.constexpr):
    """Return h = max(x, 0) + slope min(x, 0)."""
    if HAS_SLOPE:
        return tl.where(x > 0, x, slope * x)
    else:
        return tl.maximum(x, 0.0)


@triton.jit
def forward_kernel(
    x_ptr,
    gate_ptr,
    coefficients_ptr,
    slope_ptr,
    probs_ptr,
    expert_ptr,
    y_ptr,
    x_stride,
    gate_stride,
    width,
    num_experts,
    ORDER: tl.constexpr,
    ALIGN: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
    TAIL: tl.constexpr,
    HAS_GATE: tl.constexpr,
    HAS_SLOPE: tl.constexpr,
    HAS_PROBS: tl.constexpr,
    HAS_EXPERTS: tl.constexpr,
):
    """Compute p (a_0 + a_1 h + ..) u."""
    row = tl.program_id(0).to(tl.int64)
    x_stride = aligned(x_stride, ALIGN)
    gate_stride = aligned(gate_stride, ALIGN)
    width = aligned(width, ALIGN)
    expert, is_row = set_of_row(expert_ptr, row, num_experts, HAS_EXPERTS)
    p = load_prob(probs_ptr, row, is_row, HAS_PROBS, HAS_EXPERTS)
    a0, a1, a2, a3, a4 = load_set(
        coefficients_ptr + expert * (ORDER + 1), is_row, ORDER, HAS_EXPERTS
    )
    slope = 0.0
    if HAS_SLOPE:
        slope = load_of_row(slope_ptr + expert, is_row, 0.0, HAS_EXPERTS)
    x_row = x_ptr + row * x_stride
    y_row = y_ptr + row * width
    if HAS_GATE:
        gate_row = gate_ptr + row * gate_stride
    columns = tl.arange(0, BLOCK)
    for i in range(NUM_BLOCKS):
        start = i * BLOCK
        h = rectified(load_block(x_row + start, columns, is_row, HAS_EXPERTS), slope, HAS_SLOPE)
        y = p * horner(h, a0, a1, a2, a3, a4, ORDER)
        if HAS_GATE:
            y = y * load_block(gate_row + start, columns, is_row, HAS_EXPERTS)
        store_block(y_row + start, columns, y)
    if TAIL > 0:
        tail = NUM_BLOCKS * BLOCK + tl.arange(0, TAIL)
        h = rectified(load_tail(x_row, tail, width, is_row, HAS_EXPERTS), slope, HAS_SLOPE)
        y = p * horner(h, a0, a1, a2, a3, a4, ORDER)
        if HAS_GATE:
            y = y * load_tail(gate_row, tail, width, is_row, HAS_EXPERTS)
        store_tail(y_row, tail, width, y)


@triton.jit
def pointwise_gradients(x, g, p, a, slope, ORDER: tl.constexpr, HAS_SLOPE: tl.constexpr):
    """Return h, the gradient of x, and g P'(h) min(x, 0) of one tile."""
    h = rectified(x, slope, HAS_SLOPE)
    through = g * horner(h, a[1], 2.0 * a[2], 3.0 * a[3], 4.0 * a[4], 0.0, ORDER - 1)
    return h, p * through * tl.where(x > 0, 1.0, slope), through * tl.minimum(x, 0.0)


@triton.jit
def backward_kernel(
    grad_output_ptr,
    x_ptr,
    gate_ptr,
    coefficients_ptr,
    slope_ptr,
    probs_ptr,
    expert_ptr,
    grad_x_ptr,
    grad_gate_ptr,
    grad_probs_ptr,
    terms_ptr,
    slope_terms_ptr,
    grad_output_stride,
    x_stride,
    gate_stride,
    width,
    num_experts,
    ORDER: tl.constexpr,
    ALIGN: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
    TAIL: tl.constexpr,
    HAS_GATE: tl.constexpr,
    HAS_SLOPE: tl.constexpr,
    HAS_PROBS: tl.constexpr,
    HAS_EXPERTS: tl.constexpr,
):
    """Compute gradients of x, gate and probs, and the row's terms for coefficients and slope."""
    row = tl.program_id(0).to(tl.int64)
    x_stride = aligned(x_stride, ALIGN)
    gate_stride = aligned(gate_stride, ALIGN)
    grad_output_stride = aligned(grad_output_stride, ALIGN)
    width = aligned(width, ALIGN)
    expert, is_row = set_of_row(expert_ptr, row, num_experts, HAS_EXPERTS)
    p = load_prob(probs_ptr, row, is_row, HAS_PROBS, HAS_EXPERTS)
    a = load_set(coefficients_ptr + expert * (ORDER + 1), is_row, ORDER, HAS_EXPERTS)
    slope = 0.0
    if HAS_SLOPE:
        slope = load_of_row(slope_ptr + expert, is_row, 0.0, HAS_EXPERTS)
    x_row = x_ptr + row * x_stride
    grad_row = grad_output_ptr + row * grad_output_stride
    grad_x_row = grad_x_ptr + row * width
    if HAS_GATE:
        gate_row = gate_ptr + row * gate_stride
        grad_gate_row = grad_gate_ptr + row * width
    columns = tl.arange(0, BLOCK)
    zeros = tl.zeros((BLOCK,), tl.float32)
    s0, s1, s2, s3, s4, negative = zeros, zeros, zeros, zeros, zeros, zeros
    for i in range(NUM_BLOCKS):
        start = i * BLOCK
        x = load_block(x_row + start, columns, is_row, HAS_EXPERTS)
        grad = load_block(grad_row + start, columns, is_row, HAS_EXPERTS)
        g = grad
        if HAS_GATE:
            g = grad * load_block(gate_row + start, columns, is_row, HAS_EXPERTS)
        h, grad_x, below = pointwise_gradients(x, g, p, a, slope, ORDER, HAS_SLOPE)
        s0, s1, s2, s3, s4 = add_weighted(h, g, s0, s1, s2, s3, s4, ORDER)
        if HAS_SLOPE:
            negative += below
        store_block(grad_x_row + start, columns, grad_x)
        if HAS_GATE:
            grad_gate = p * grad * horner(h, a[0], a[1], a[2], a[3], a[4], ORDER)
            store_block(grad_gate_row + start, columns, grad_gate)
    s0, s1, s2, s3, s4 = tl.sum(s0), tl.sum(s1), tl.sum(s2), tl.sum(s3), tl.sum(s4)
    negative = tl.sum(negative)
    if TAIL > 0:
        tail = NUM_BLOCKS * BLOCK + tl.arange(0, TAIL)
        x = load_tail(x_row, tail, width, is_row, HAS_EXPERTS)
        grad = load_tail(grad_row, tail, width, is_row, HAS_EXPERTS)
        g = grad
        if HAS_GATE:
            g = grad * load_tail(gate_row, tail, width, is_row, HAS_EXPERTS)
        h, grad_x, below = pointwise_gradients(x, g, p, a, slope, ORDER, HAS_SLOPE)
        store_tail(grad_x_row, tail, width, grad_x)
        if HAS_GATE:
            grad_gate = p * grad * horner(h, a[0], a[1], a[2], a[3], a[4], ORDER)
            store_tail(grad_gate_row, tail, width, grad_gate)
        t0, t1, t2, t3, t4 = weighted_sums(h, g, ORDER)
        s0, s1, s2, s3, s4 = s0 + t0, s1 + t1, s2 + t2, s3 + t3, s4 + t4
        if HAS_SLOPE:
            negative += tl.sum(below)
    store_set(terms_ptr + row * (ORDER + 1), p * s0, p * s1, p * s2, p * s3, p * s4, ORDER)
    if HAS_SLOPE:
        tl.store(slope_terms_ptr + row, p * negative)
    if HAS_PROBS:
        grad_prob = a[0] * s0 + a[1] * s1 + a[2] * s2 + a[3] * s3 + a[4] * s4
        tl.store(grad_probs_ptr + row, grad_prob)
