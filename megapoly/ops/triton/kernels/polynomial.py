"""Device functions on one tile: powers, polynomials, scales.

Orders are at most 4; the terms above ``ORDER`` are zeros that the compiler removes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megapoly.ops.triton.kernels.tiles import load_of_row

# The constants of megapoly.ops.polynorm_reference as Triton's compiler needs them.
SQUARE_SUM_SHIFT = tl.constexpr(2.0**-8)
FIRST_ROOT_SHIFT = tl.constexpr(2.0**16)
TARGET = tl.constexpr(16.0)
# If the sums of squares are below this, nothing has overflowed and the row needs no scale.
SAFE_SUM = tl.constexpr(2.0**100)


@triton.jit
def power_of_two(x):
    """Round x > 0 down to a power of two."""
    return (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)


@triton.jit
def inverse_power_of_two(x):
    """Return 1 / x of a power of two, exactly; a division would be approximate."""
    return (0x7F000000 - x.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)


@triton.jit
def scale_of_largest(largest):
    """Return a power of two, at least 1, that scales a row's largest element below 32."""
    return tl.maximum(power_of_two(largest) * (1.0 / TARGET), 1.0)


@triton.jit
def inverse_scale(first_root):
    """Return 1 / m from r_1 2^16."""
    return tl.minimum(power_of_two(first_root) * (TARGET / FIRST_ROOT_SHIFT), 1.0)


@triton.jit
def first_true_root(first_root, inverse):
    """Return t_1 = r_1 m."""
    return first_root * (inverse_power_of_two(inverse) * (1.0 / FIRST_ROOT_SHIFT))


@triton.jit
def load_set(pointer, is_row, ORDER: tl.constexpr, HAS_EXPERTS: tl.constexpr):
    """Load c_0 .. c_4 of a row as fp32; 0 above ``ORDER`` and for padding."""
    c0 = load_of_row(pointer, is_row, 0.0, HAS_EXPERTS)
    c1 = load_of_row(pointer + 1, is_row, 0.0, HAS_EXPERTS)
    c2 = load_of_row(pointer + 2, is_row, 0.0, HAS_EXPERTS)
    c3 = load_of_row(pointer + 3, is_row, 0.0, HAS_EXPERTS) if ORDER >= 3 else 0.0
    c4 = load_of_row(pointer + 4, is_row, 0.0, HAS_EXPERTS) if ORDER >= 4 else 0.0
    return c0, c1, c2, c3, c4


@triton.jit
def load_roots(pointer, is_row, ORDER: tl.constexpr, HAS_EXPERTS: tl.constexpr):
    """Load 1 / m and t_1 .. t_4 of a row from its saved reciprocal roots; 1 for padding."""
    first = load_of_row(pointer, is_row, 1.0, HAS_EXPERTS)
    r2 = load_of_row(pointer + 1, is_row, 1.0, HAS_EXPERTS)
    r3 = load_of_row(pointer + 2, is_row, 1.0, HAS_EXPERTS) if ORDER >= 3 else 0.0
    r4 = load_of_row(pointer + 3, is_row, 1.0, HAS_EXPERTS) if ORDER >= 4 else 0.0
    inverse = inverse_scale(first)
    return inverse, first_true_root(first, inverse), r2, r3, r4


@triton.jit
def horner(x, c0, c1, c2, c3, c4, ORDER: tl.constexpr):
    """Evaluate c0 + c1 x + .. up to ``ORDER``."""
    if ORDER == 1:
        return c1 * x + c0
    elif ORDER == 2:
        return (c2 * x + c1) * x + c0
    elif ORDER == 3:
        return ((c3 * x + c2) * x + c1) * x + c0
    else:
        return (((c4 * x + c3) * x + c2) * x + c1) * x + c0


@triton.jit
def square_sums(x, ORDER: tl.constexpr):
    """Sum x^2, x^4, .. over a tile."""
    square = x * x
    power = square * square
    q1 = tl.sum(square)
    q2 = tl.sum(power)
    q3 = tl.full((), 0.0, tl.float32)
    q4 = tl.full((), 0.0, tl.float32)
    if ORDER >= 3:
        power = power * square
        q3 = tl.sum(power)
    if ORDER >= 4:
        power = power * square
        q4 = tl.sum(power)
    return q1, q2, q3, q4


@triton.jit
def weighted_sums(z, g, ORDER: tl.constexpr):
    """Sum g, g z, g z^2, .. over a tile."""
    s0 = tl.sum(g)
    g = g * z
    s1 = tl.sum(g)
    g = g * z
    s2 = tl.sum(g)
    s3 = tl.full((), 0.0, tl.float32)
    s4 = tl.full((), 0.0, tl.float32)
    if ORDER >= 3:
        g = g * z
        s3 = tl.sum(g)
    if ORDER >= 4:
        g = g * z
        s4 = tl.sum(g)
    return s0, s1, s2, s3, s4


@triton.jit
def add_weighted(z, g, s0, s1, s2, s3, s4, ORDER: tl.constexpr):
    """Add g, g z, g z^2, .. lane by lane."""
    s0 += g
    g = g * z
    s1 += g
    g = g * z
    s2 += g
    if ORDER >= 3:
        g = g * z
        s3 += g
    if ORDER >= 4:
        g = g * z
        s4 += g
    return s0, s1, s2, s3, s4


@triton.jit
def largest_of(sums_1, sums_2, sums_3, sums_4, ORDER: tl.constexpr):
    """Return the sum of the highest power, which overflows first."""
    if ORDER == 2:
        return sums_2
    elif ORDER == 3:
        return sums_3
    else:
        return sums_4


@triton.jit
def store_set(pointer, v0, v1, v2, v3, v4, ORDER: tl.constexpr):
    """Store v0 .. v_ORDER contiguously."""
    tl.store(pointer, v0)
    tl.store(pointer + 1, v1)
    tl.store(pointer + 2, v2)
    if ORDER >= 3:
        tl.store(pointer + 3, v3)
    if ORDER >= 4:
        tl.store(pointer + 4, v4)
