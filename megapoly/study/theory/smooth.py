"""Local Taylor polynomials as PolyReLU and as ReLU networks: Theorem 3."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product as each_of
from typing import Protocol

import torch
from torch import Tensor

from megapoly.polynomial import DEFAULT_ORDER
from megapoly.study.theory import imitation, powers
from megapoly.study.theory.builder import Builder, Value
from megapoly.study.theory.network import Network


@dataclass(frozen=True)
class Wave:
    """f(x) = sin(w . x + phase); for |w_k| <= 1 derivatives are at most 1, so f is in each F_{n,d}.

    Attributes:
        frequencies: w, with d entries.
        phase: in radians.
    """

    frequencies: tuple[float, ...]
    phase: float

    def __call__(self, x: Tensor) -> Tensor:
        """Return [points] values at ``x`` of [points, d]."""
        return torch.sin(x @ torch.tensor(self.frequencies, dtype=x.dtype) + self.phase)

    def derivative(self, orders: Sequence[int], point: Sequence[float]) -> float:
        """Return the derivative D^orders f at ``point``."""
        angle = self.phase + sum(w * x for w, x in zip(self.frequencies, point, strict=True))
        factor = math.prod(w**i for w, i in zip(self.frequencies, orders, strict=True))
        return factor * math.sin(angle + sum(orders) * math.pi / 2)


def multi_indices(n: int, d: int) -> list[tuple[int, ...]]:
    """Return the C(n + d - 1, d) multi-indices with a sum below n, the lowest degree first.

    The paper bounds their number by d^n, which is 1 for d = 1, although there are n.
    """
    return sorted((i for i in each_of(range(n), repeat=d) if sum(i) < n), key=sum)


def error_bound(n: int, d: int, num_cells: int) -> float:
    """Return the error bound (2 d / (3 N))^n / n! for a function in F_{n,d}.

    Source: PolyCom (ICLR 2025), Eq. 29, without its factor 2^d: the bumps sum to 1.
    """
    return (2 * d / (3 * num_cells)) ** n / math.factorial(n)


class Arithmetic(Protocol):
    """Products and powers of values."""

    def local(self, x: Value, centre: int, num_cells: int) -> tuple[Value, float]:
        """Return v and a factor s, x - m / N = s v wherever the bump of the cell is not 0."""

    def power(self, v: Value, i: int) -> Value:
        """Return v^i."""

    def product(self, u: Value, v: Value) -> Value:
        """Return a product that is 0 wherever ``u`` is."""


class ExactArithmetic:
    """Exact arithmetic by PolyReLU units (:mod:`megapoly.study.theory.powers`)."""

    def local(self, x: Value, centre: int, num_cells: int) -> tuple[Value, float]:
        """Return v = x - m / N and the factor 1."""
        return x - centre / num_cells, 1.0

    def power(self, v: Value, i: int) -> Value:
        """Return v^i by Lemma A.4."""
        return powers.power(v, i)

    def product(self, u: Value, v: Value) -> Value:
        """Return the product of values of any size."""
        return powers.product(u, v)


@dataclass(frozen=True)
class ReluArithmetic:
    """Approximate arithmetic by ReLU units, each operation within 4^-(m + 1).

    See :mod:`megapoly.study.theory.imitation`.
    """

    num_teeth: int

    def local(self, x: Value, centre: int, num_cells: int) -> tuple[Value, float]:
        """Return v = (x - m / N) 3 N / 2, clipped to [-1, 1] for products, and 2 / (3 N)."""
        return imitation.clip(x * (1.5 * num_cells) - 1.5 * centre), 2 / (3 * num_cells)

    def power(self, v: Value, i: int) -> Value:
        """Return v^i by i - 1 products."""
        if i == 0:
            return v.builder.constant(1.0)
        return v if i == 1 else self.product(self.power(v, i - 1), v)

    def product(self, u: Value, v: Value) -> Value:
        """Return the product of values in [-1, 1]."""
        return imitation.product(u, v, self.num_teeth)


def polyrelu_network(function: Wave, n: int, num_cells: int, order: int = DEFAULT_ORDER) -> Network:
    """Return the PolyReLU network that equals f_N, of degree n - 1 in each of (2 N + 1)^d cells.

        f_N(x) = sum_m phi_m(x) P_m(x),   |f - f_N| <= (2 d / (3 N))^n / n!

    Source: PolyCom (ICLR 2025), Theorem 3, Eqs. 27 to 35. The paper's Corollary A.1 represents
    piecewise linear functions exactly. For d > 1 phi_m, a product of such functions, is not
    piecewise linear, and phi_m P_m is not for any d. Units of order 2 compute these products
    exactly, with four units each, so the stated size holds.

    Args:
        function: f.
        n: order up to which derivatives are at most 1.
        num_cells: N, cells on either side of 0.
        order: r >= 2, of the units.
    """
    builder = Builder(len(function.frequencies), order)
    return _taylor_network(function, n, num_cells, builder, ExactArithmetic())


def relu_network(function: Wave, n: int, num_cells: int) -> Network:
    """Return f_N by ReLU units, with an error of the products within the error of f_N itself.

    Source: Yarotsky (2017), Theorem 1: O(eps^(-d/n) ln(1 / eps)) parameters, because each product
    needs O(ln(1 / eps)).
    """
    d = len(function.frequencies)
    scale = 2 / (3 * num_cells)
    # At each point 2^d bumps are not 0. Error relative to that of one product, for a polynomial of
    # size B: d B from products with and of bumps, and (|i| - 1) from each monomial.
    weights = {i: scale ** sum(i) / _factorial(i) for i in multi_indices(n, d)}
    bound = sum(weights.values())
    own = sum((sum(i) - 1) * w for i, w in weights.items() if sum(i) > 1)
    num_teeth = 1
    while 2**d * (d * bound + own) * 0.25 ** (num_teeth + 1) > error_bound(n, d, num_cells):
        num_teeth += 1
    return _taylor_network(function, n, num_cells, Builder(d, 1), ReluArithmetic(num_teeth))


def taylor_sum(function: Wave, n: int, num_cells: int, x: Tensor) -> Tensor:
    """Compute f_N by its formula, without a network: [points] for ``x`` of [points, d]."""
    total = torch.zeros(len(x), dtype=x.dtype)
    for cell in _cells(num_cells, x.shape[1]):
        offset = x - torch.tensor(cell, dtype=x.dtype) / num_cells
        bump = (2 - (3 * num_cells * offset).abs()).clamp(0, 1).prod(1)
        for orders, a in _taylor(function, n, cell, num_cells).items():
            total += a * bump * (offset ** torch.tensor(orders)).prod(1)
    return total


def _taylor_network(
    function: Wave, n: int, num_cells: int, builder: Builder, arithmetic: Arithmetic
) -> Network:
    total = builder.constant(0.0)
    for cell in _cells(num_cells, len(builder.inputs)):
        bump = builder.constant(1.0)
        polynomial = builder.constant(0.0)
        variables = []
        for x, centre in zip(builder.inputs, cell, strict=True):
            factor = _bump(x, centre, num_cells)
            bump = arithmetic.product(bump, factor) if bump.terms else factor
            variables.append(arithmetic.local(x, centre, num_cells))
        limit = 0.0
        for orders, a in _taylor(function, n, cell, num_cells).items():
            a *= math.prod(scale**i for (_, scale), i in zip(variables, orders, strict=True))
            polynomial = polynomial + _monomial(variables, orders, builder, arithmetic) * a
            limit += abs(a)
        if polynomial.terms:
            # ReLU products need values in [-1, 1].
            total = total + arithmetic.product(bump, polynomial * (1 / limit)) * limit
        else:
            total = total + bump * polynomial.constant
    return builder.build([total])


def _bump(x: Value, centre: int, num_cells: int) -> Value:
    """Return ReLU(1 - ReLU(t - 1) - ReLU(-t - 1)), t = 3 N x - 3 m; exactly 0 for |t| >= 2."""
    unit = x.builder.unit
    t = x * (3.0 * num_cells) - 3.0 * centre
    return unit(1.0 - unit(t - 1.0) - unit(-t - 1.0))


def _monomial(
    variables: Sequence[tuple[Value, float]],
    orders: Sequence[int],
    builder: Builder,
    arithmetic: Arithmetic,
) -> Value:
    result: Value | None = None
    for (v, _), i in zip(variables, orders, strict=True):
        if i:
            factor = arithmetic.power(v, i)
            result = factor if result is None else arithmetic.product(result, factor)
    return builder.constant(1.0) if result is None else result


def _taylor(
    function: Wave, n: int, cell: Sequence[int], num_cells: int
) -> dict[tuple[int, ...], float]:
    """Return D^i f(m / N) / i! for each multi-index i."""
    point = [m / num_cells for m in cell]
    return {
        orders: function.derivative(orders, point) / _factorial(orders)
        for orders in multi_indices(n, len(cell))
    }


def _cells(num_cells: int, d: int) -> Iterator[tuple[int, ...]]:
    return each_of(range(-num_cells, num_cells + 1), repeat=d)


def _factorial(orders: Sequence[int]) -> int:
    return math.prod(map(math.factorial, orders))
