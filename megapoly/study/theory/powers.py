"""Polynomials, products and powers that PolyReLU units compute exactly: Lemmas 1 and A.4."""

from __future__ import annotations

from collections.abc import Sequence

from megapoly.study.theory.builder import Builder, Value
from megapoly.study.theory.network import Network


def polynomial(value: Value, coefficients: Sequence[float]) -> Value:
    """A polynomial activation as two PolyReLU units.

        sum_i a_i x^i = PolyReLU_1(x) + PolyReLU_2(-x)
        PolyReLU_1 = sum_{i>=0} a_i ReLU^i,   PolyReLU_2 = sum_{i>=1} (-1)^i a_i ReLU^i

    Source: PolyCom (ICLR 2025), Lemma 1, Eq. 6. Eq. 5, x^i = ReLU^i(x) + (-1)^i ReLU^i(-x), is
    stated for every natural i; for i = 0 its right side is 2. Eq. 6 has it right: the second sum
    starts at 1.

    Args:
        value: x.
        coefficients: a, ascending powers, at most the order of the network + 1.
    """
    unit = value.builder.unit
    mirrored = [0.0, *((-1.0) ** i * a for i, a in enumerate(coefficients) if i)]
    return unit(value, coefficients) + unit(-value, mirrored)


def product(u: Value, v: Value) -> Value:
    """Product, u v = ((u + v)^2 - (u - v)^2) / 4: four units of order 2."""
    square = (0.0, 0.0, 1.0)
    return (polynomial(u + v, square) - polynomial(u - v, square)) * 0.25


def power(value: Value, n: int) -> Value:
    """x^n for every real x, from the digits of n in base r.

        x^n = prod_i (x^(r^i))^(c_i),   n = sum_i c_i r^i,   k = floor(log_r n)

    Source: PolyCom (ICLR 2025), Lemma A.4. The paper computes each x^(c_i r^i) by a chain of its
    own, sum_i (i + 1) = O(ln^2 n) units, and counts neither the products between them nor (in its
    Eq. 23, where (x^r)^i stands for x^(r^i)) the digits. Here the chain x, x^r, x^(r^2), .. is
    shared and the products are counted: at most :func:`power_units`, O(ln n), so the stated size
    holds with room.

    Args:
        value: x.
        n: 0 or more.

    Note:
        Equality is of real numbers (:meth:`Network.exactly` shows it). In fp64 the products cancel
        where |x| is far from 1: the error is within rounding of max(1, |x|)^(2n), not of x^n.
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
    """x^n as a PolyReLU network of that order (2 or more), by :func:`power`."""
    builder = Builder(1, order)
    return builder.build([power(builder.inputs[0], n)])


def digits_of(n: int, base: int) -> list[int]:
    """Digits, the lowest first."""
    digits = []
    while n:
        n, digit = divmod(n, base)
        digits.append(digit)
    return digits


def power_units(n: int, order: int) -> int:
    """Largest number of units that :func:`power` takes: 8 k + 4, k = floor(log_r n).

    2 k units make x^r .. x^(r^k), 2 (k + 1) the factors, 4 k the products and 2 carry the first
    factor for one layer. It is met when no digit is 0 (and k > 0; 2 units do for k = 0).
    """
    k = len(digits_of(n, order)) - 1
    return 8 * k + 4 if k else 2


def paper_power_units(n: int, order: int) -> int:
    """The paper's count, Eq. 24, of polynomial units: sum_{i=0}^k (i + 1)."""
    k = len(digits_of(n, order)) - 1
    return (k + 1) * (k + 2) // 2
