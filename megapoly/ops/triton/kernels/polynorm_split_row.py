"""PolyNorm kernels for a part of each row: rows split over ranks, or too long for one program.

Statistics and pointwise work are separate kernels, with the sum over ranks between them. One
program processes one row in blocks and a masked tail; each lane adds its own elements, and the
lanes are added once at the end.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megapoly.ops.triton.kernels.polynomial import (
    FIRST_ROOT_SHIFT,
    SAFE_SUM,
    SQUARE_SUM_SHIFT,
    add_weighted,
    horner,
    inverse_power_of_two,
    inverse_scale,
    largest_of,
    load_roots,
    load_set,
    scale_of_largest,
    store_set,
    weighted_sums,
)
from megapoly.ops.triton.kernels.polynorm_whole_row import gradient_constants, input_gradient
from megapoly.ops.triton.kernels.tiles import (
    aligned,
    load_block,
    load_prob,
    load_tail,
    set_of_row,
    store_block,
    store_tail,
)


@triton.jit
def add_squares(x, q1, q2, q3, q4, ORDER: tl.constexpr):
    """Add x^2, x^4, .. lane by lane."""
    square = x * x
    power = square * square
    q1 += square
    q2 += power
    if ORDER >= 3:
        power = power * square
        q3 += power
    if ORDER >= 4:
        power = power * square
        q4 += power
    return q1, q2, q3, q4


@triton.jit
def part_square_sums(
    x_row,
    inverse,
    width,
    ORDER: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
    TAIL: tl.constexpr,
):
    """Sum (x inverse)^2, (x inverse)^4, .. over this part of the row."""
    columns = tl.arange(0, BLOCK)
    q1 = tl.zeros((BLOCK,), tl.float32)
    q2 = tl.zeros((BLOCK,), tl.float32)
    q3 = tl.zeros((BLOCK,), tl.float32)
    q4 = tl.zeros((BLOCK,), tl.float32)
    for i in range(NUM_BLOCKS):
        x = load_block(x_row + i * BLOCK, columns, True, False) * inverse
        q1, q2, q3, q4 = add_squares(x, q1, q2, q3, q4, ORDER)
    s1, s2, s3, s4 = tl.sum(q1), tl.sum(q2), tl.sum(q3), tl.sum(q4)
    if TAIL > 0:
        tail = NUM_BLOCKS * BLOCK + tl.arange(0, TAIL)
        x = load_tail(x_row, tail, width, True, False) * inverse
        zero = tl.zeros((TAIL,), tl.float32)
        q1, q2, q3, q4 = add_squares(x, zero, zero, zero, zero, ORDER)
        s1, s2, s3, s4 = s1 + tl.sum(q1), s2 + tl.sum(q2), s3 + tl.sum(q3), s4 + tl.sum(q4)
    return s1, s2, s3, s4


@triton.jit
def largest_element(
    x_row, width, NUM_BLOCKS: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr
):
    """Return the largest |x| of this part of the row."""
    columns = tl.arange(0, BLOCK)
    largest = tl.zeros((BLOCK,), tl.float32)
    for i in range(NUM_BLOCKS):
        largest = tl.maximum(largest, tl.abs(load_block(x_row + i * BLOCK, columns, True, False)))
    result = tl.max(largest)
    if TAIL > 0:
        tail = NUM_BLOCKS * BLOCK + tl.arange(0, TAIL)
        result = tl.maximum(result, tl.max(tl.abs(load_tail(x_row, tail, width, True, False))))
    return result


@triton.jit
def square_sums_kernel(
    x_ptr,
    square_sums_ptr,
    x_stride,
    width,
    ORDER: tl.constexpr,
    ALIGN: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
    TAIL: tl.constexpr,
):
    """Compute sum_j (x_j 2^-8)^2k: [rows, ORDER] fp64."""
    row = tl.program_id(0).to(tl.int64)
    x_stride = aligned(x_stride, ALIGN)
    width = aligned(width, ALIGN)
    x_row = x_ptr + row * x_stride
    scale = tl.full((), 1.0, tl.float32)
    q1, q2, q3, q4 = part_square_sums(x_row, 1.0, width, ORDER, NUM_BLOCKS, BLOCK, TAIL)
    if not (largest_of(q1, q2, q3, q4, ORDER) < SAFE_SUM):
        scale = scale_of_largest(largest_element(x_row, width, NUM_BLOCKS, BLOCK, TAIL))
        q1, q2, q3, q4 = part_square_sums(
            x_row, inverse_power_of_two(scale), width, ORDER, NUM_BLOCKS, BLOCK, TAIL
        )
    unit = (scale * SQUARE_SUM_SHIFT).to(tl.float64)
    unit = unit * unit
    square_sums_row = square_sums_ptr + row * ORDER
    tl.store(square_sums_row, q1.to(tl.float64) * unit)
    tl.store(square_sums_row + 1, q2.to(tl.float64) * (unit * unit))
    if ORDER >= 3:
        tl.store(square_sums_row + 2, q3.to(tl.float64) * (unit * unit * unit))
    if ORDER >= 4:
        tl.store(square_sums_row + 3, q4.to(tl.float64) * (unit * unit) * (unit * unit))


@triton.jit(do_not_specialize=["num_rows"])
def rsqrt_kernel(
    square_sums_ptr,
    rsqrt_ptr,
    num_rows,
    divisor,
    eps,
    ORDER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute [r_1 2^16, t_2, ..] from sums over whole rows, in fp64; BLOCK rows per program."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = rows < num_rows
    mean = tl.load(square_sums_ptr + rows * ORDER, mask=mask, other=1.0) / divisor
    mean = mean * (1.0 / (SQUARE_SUM_SHIFT * SQUARE_SUM_SHIFT)) + eps
    first = (1.0 / tl.sqrt(mean) * FIRST_ROOT_SHIFT).to(tl.float32)
    tl.store(rsqrt_ptr + rows * ORDER, first, mask=mask)
    unit = inverse_scale(first).to(tl.float64)
    unit = unit * unit
    power = unit
    shifted_unit = unit * (1.0 / (SQUARE_SUM_SHIFT * SQUARE_SUM_SHIFT))
    shifted_power = shifted_unit
    for k in tl.static_range(1, ORDER):
        power = power * unit
        shifted_power = shifted_power * shifted_unit
        mean = tl.load(square_sums_ptr + rows * ORDER + k, mask=mask, other=1.0) / divisor
        root = 1.0 / tl.sqrt(mean * shifted_power + eps * power)
        tl.store(rsqrt_ptr + rows * ORDER + k, root.to(tl.float32), mask=mask)


@triton.jit
def evaluate_kernel(
    x_ptr,
    rsqrt_ptr,
    factor_ptr,
    coefficients_ptr,
    probs_ptr,
    expert_ptr,
    y_ptr,
    x_stride,
    factor_stride,
    width,
    num_experts,
    ORDER: tl.constexpr,
    ALIGN: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
    TAIL: tl.constexpr,
    HAS_FACTOR: tl.constexpr,
    HAS_PROBS: tl.constexpr,
    HAS_EXPERTS: tl.constexpr,
):
    """Compute p (a_0 + a_1 n(x) + ..) factor."""
    row = tl.program_id(0).to(tl.int64)
    x_stride = aligned(x_stride, ALIGN)
    factor_stride = aligned(factor_stride, ALIGN)
    width = aligned(width, ALIGN)
    expert, is_row = set_of_row(expert_ptr, row, num_experts, HAS_EXPERTS)
    inverse, r1, r2, r3, r4 = load_roots(rsqrt_ptr + row * ORDER, is_row, ORDER, HAS_EXPERTS)
    a0, a1, a2, a3, a4 = load_set(
        coefficients_ptr + expert * (ORDER + 1), is_row, ORDER, HAS_EXPERTS
    )
    p = load_prob(probs_ptr, row, is_row, HAS_PROBS, HAS_EXPERTS)
    c0, c1, c2, c3, c4 = p * a0, p * a1 * r1, p * a2 * r2, p * a3 * r3, p * a4 * r4
    x_row = x_ptr + row * x_stride
    if HAS_FACTOR:
        factor_row = factor_ptr + row * factor_stride
    y_row = y_ptr + row * width
    columns = tl.arange(0, BLOCK)
    for i in range(NUM_BLOCKS):
        start = i * BLOCK
        z = load_block(x_row + start, columns, is_row, HAS_EXPERTS) * inverse
        y = horner(z, c0, c1, c2, c3, c4, ORDER)
        if HAS_FACTOR:
            y = y * load_block(factor_row + start, columns, is_row, HAS_EXPERTS)
        store_block(y_row + start, columns, y)
    if TAIL > 0:
        tail = NUM_BLOCKS * BLOCK + tl.arange(0, TAIL)
        z = load_tail(x_row, tail, width, is_row, HAS_EXPERTS) * inverse
        y = horner(z, c0, c1, c2, c3, c4, ORDER)
        if HAS_FACTOR:
            y = y * load_tail(factor_row, tail, width, is_row, HAS_EXPERTS)
        store_tail(y_row, tail, width, y)


@triton.jit
def gradient_sums_kernel(
    x_ptr,
    rsqrt_ptr,
    grad_output_ptr,
    gate_ptr,
    sums_ptr,
    x_stride,
    grad_output_stride,
    gate_stride,
    width,
    ORDER: tl.constexpr,
    ALIGN: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
    TAIL: tl.constexpr,
    HAS_GATE: tl.constexpr,
):
    """Sum g_j u_j z_j^k over this part of the row: [rows, ORDER + 1]."""
    row = tl.program_id(0).to(tl.int64)
    x_stride = aligned(x_stride, ALIGN)
    gate_stride = aligned(gate_stride, ALIGN)
    grad_output_stride = aligned(grad_output_stride, ALIGN)
    width = aligned(width, ALIGN)
    inverse = inverse_scale(tl.load(rsqrt_ptr + row * ORDER))
    x_row = x_ptr + row * x_stride
    grad_row = grad_output_ptr + row * grad_output_stride
    if HAS_GATE:
        gate_row = gate_ptr + row * gate_stride
    columns = tl.arange(0, BLOCK)
    sums = tl.zeros((BLOCK,), tl.float32)
    s0, s1, s2, s3, s4 = sums, sums, sums, sums, sums
    for i in range(NUM_BLOCKS):
        start = i * BLOCK
        z = load_block(x_row + start, columns, True, False) * inverse
        g = load_block(grad_row + start, columns, True, False)
        if HAS_GATE:
            g = g * load_block(gate_row + start, columns, True, False)
        s0, s1, s2, s3, s4 = add_weighted(z, g, s0, s1, s2, s3, s4, ORDER)
    t0, t1, t2, t3, t4 = tl.sum(s0), tl.sum(s1), tl.sum(s2), tl.sum(s3), tl.sum(s4)
    if TAIL > 0:
        tail = NUM_BLOCKS * BLOCK + tl.arange(0, TAIL)
        z = load_tail(x_row, tail, width, True, False) * inverse
        g = load_tail(grad_row, tail, width, True, False)
        if HAS_GATE:
            g = g * load_tail(gate_row, tail, width, True, False)
        u0, u1, u2, u3, u4 = weighted_sums(z, g, ORDER)
        t0, t1, t2, t3, t4 = t0 + u0, t1 + u1, t2 + u2, t3 + u3, t4 + u4
    store_set(sums_ptr + row * (ORDER + 1), t0, t1, t2, t3, t4, ORDER)


@triton.jit
def gradients_kernel(
    x_ptr,
    rsqrt_ptr,
    sums_ptr,
    grad_output_ptr,
    gate_ptr,
    coefficients_ptr,
    probs_ptr,
    expert_ptr,
    grad_x_ptr,
    grad_probs_ptr,
    terms_ptr,
    x_stride,
    grad_output_stride,
    gate_stride,
    width,
    num_experts,
    inverse_divisor,
    ORDER: tl.constexpr,
    ALIGN: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
    TAIL: tl.constexpr,
    HAS_GATE: tl.constexpr,
    HAS_PROBS: tl.constexpr,
    HAS_EXPERTS: tl.constexpr,
):
    """Compute the gradients of x and probs, and each row's terms for the coefficients."""
    row = tl.program_id(0).to(tl.int64)
    x_stride = aligned(x_stride, ALIGN)
    gate_stride = aligned(gate_stride, ALIGN)
    grad_output_stride = aligned(grad_output_stride, ALIGN)
    width = aligned(width, ALIGN)
    expert, is_row = set_of_row(expert_ptr, row, num_experts, HAS_EXPERTS)
    p = load_prob(probs_ptr, row, is_row, HAS_PROBS, HAS_EXPERTS)
    sums_row = sums_ptr + row * (ORDER + 1)
    s0, s1, s2, s3, s4 = load_set(sums_row, is_row, ORDER, HAS_EXPERTS)
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
    x_row = x_ptr + row * x_stride
    grad_row = grad_output_ptr + row * grad_output_stride
    if HAS_GATE:
        gate_row = gate_ptr + row * gate_stride
    grad_x_row = grad_x_ptr + row * width
    columns = tl.arange(0, BLOCK)
    for i in range(NUM_BLOCKS):
        start = i * BLOCK
        z = load_block(x_row + start, columns, is_row, HAS_EXPERTS) * inverse
        g = load_block(grad_row + start, columns, is_row, HAS_EXPERTS)
        if HAS_GATE:
            g = g * load_block(gate_row + start, columns, is_row, HAS_EXPERTS)
        grad_x = input_gradient(z, g, direct, through_norm, inverse, ORDER)
        store_block(grad_x_row + start, columns, grad_x)
    if TAIL > 0:
        tail = NUM_BLOCKS * BLOCK + tl.arange(0, TAIL)
        z = load_tail(x_row, tail, width, is_row, HAS_EXPERTS) * inverse
        g = load_tail(grad_row, tail, width, is_row, HAS_EXPERTS)
        if HAS_GATE:
            g = g * load_tail(gate_row, tail, width, is_row, HAS_EXPERTS)
        store_tail(
            grad_x_row, tail, width, input_gradient(z, g, direct, through_norm, inverse, ORDER)
        )
