"""Exact polynomials, products and powers by PolyReLU units: Lemmas 1 and A.4."""

from __future__ import annotations

from collections.abc import Sequence

from megapoly.study.theory.builder import Builder, Value
from megapoly.study.theory.network import Network


def polynomial(value: Value, coefficients: Sequence[float]) -> Value:
    """Compute a polynomial activation with two PolyReLU units.

        sum_i a_i x^i = PolyReLU_1(x) + PolyReLU_2(-x)
        PolyReLU_1 = sum_{i>=0} a_i ReLU^i,   PolyReLU_2 = sum_{i>=1} (-1)^i a_i ReLU^i

    Source: PolyCom (ICLR 2025), Lemma 1, Eq. 6. Eq. 5, x^i = ReLU^i(x) + (-1)^i ReLU^i(-x), is
    stated for every natural i; for i = 0 its right side is 2. Eq. 6 is correct: its second sum
    starts at 1.

    Args:
        value: x.
        coefficients: a, ascending powers, at most the order of the network + 1.
    """
    unit = value.builder.unit
    mirrored = [0.0, *((-1.0) ** i * a for i, a in enumerate(coefficients) if i)]
    return unit(value, coefficients) + unit(-value, mirrored)


def product(u: Value, v: Value) -> Value:
    """Compute u v = ((u + v)^2 - (u - v)^2) / 4 with four units of order 2."""
    square = (0.0, 0.0, 1.0)
    return (polynomial(u + v, square) - polynomial(u - v, square)) * 0.25


def power(value: Value, n: int) -> Value:
    """Compute x^n for every real x, from the digits of n in base r.

        x^n = prod_i (x^(r^i))^(c_i),   n = sum_i c_i r^i,   k = floor(log_r n)

    Source: PolyCom (ICLR 2025), Lemma A.4. The paper computes each x^(c_i r^i) by a separate chain,
    sum_i (i + 1) = O(ln^2 n) units, and counts neither the products between them nor (in its
    Eq. 23, where (x^r)^i stands for x^(r^i)) the digits. Here the chain x, x^r, x^(r^2), .. is
    shared and the products are counted: at most :func:`power_units`, O(ln n), which is below the
    stated size.

    Args:
        value: x.
        n: 0 or more.

    Note:
        The equality holds for real numbers, as :meth:`Network.exactly` shows. In fp64 the products
        cancel if |x| is far from 1: the error is within rounding of max(1, |x|)^(2n), not of x^n.
    """
    builder = value.builder
    r = builder.order
    if n == 0:
        return builder.constant(1.0)
    result: Value | None = None
    base = value
    while n:
        n, digit = divmod(n, r)
        if digit:
            factor = polynomial(base, [0.0] * digit + [1.0])
            result = factor if result is None else product(result, factor)
        if n:
            base = polynomial(base, [0.0] * r + [1.0])
    assert result is not None
    return result


def power_network(n: int, order: int) -> Network:
    """Return x^n as a PolyReLU network of an order of at least 2, by :func:`power`."""
    builder = Builder(1, order)
    return builder.build([power(builder.inputs[0], n)])


def digits_of(n: int, base: int) -> list[int]:
    """Return the digits of n, the lowest first."""
    digits = []
    while n:
        n, digit = divmod(n, base)
        digits.append(digit)
    return digits


def power_units(n: int, order: int) -> int:
    """Return the largest number of units of :func:`power`: 8 k + 4, k = floor(log_r n).

    2 k units compute x^r .. x^(r^k), 2 (k + 1) the factors, 4 k the products, and 2 carry the first
    factor for one layer. This is reached if no digit is 0 and k > 0; for k = 0, 2 units suffice.
    """
    k = len(digits_of(n, order)) - 1
    return 8 * k + 4 if k else 2


def paper_power_units(n: int, order: int) -> int:
    """Return the paper's number of polynomial units, Eq. 24: sum_{i=0}^k (i + 1)."""
    k = len(digits_of(n, order)) - 1
    return (k + 1) * (k + 2) // 2
