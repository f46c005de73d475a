"""Piecewise polynomials by one hidden layer: the economical networks of Theorem 3, for d = 1."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import torch

from megapoly.errors import UnavailableError
from megapoly.polynomial import DEFAULT_ORDER
from megapoly.study.theory.builder import Builder
from megapoly.study.theory.network import Network
from megapoly.study.theory.smooth import Wave


def spline_network(function: Wave, n: int, num_cells: int, order: int = DEFAULT_ORDER) -> Network:
    """Return the interpolating spline of degree max(1, n - 1) as a network of one hidden layer.

        s(x) = f(-1) + sum_j sum_i c_ji ReLU(x - t_j)^i,   t_j = -1 + j / N,  j = 0 .. 2 N - 1

    In each of the 2 N cells s is the polynomial through f at equally spaced points, both ends
    included, so it is continuous, and the change at a knot is a sum of powers from the first on:
    one PolyReLU unit of order n - 1 or more. With ``order`` 1 the units are ReLU and n is 1 or 2.

    Args:
        function: f, of one variable.
        n: order up to which derivatives are at most 1.
        num_cells: N, cells on either side of 0.
        order: r, of the units; 1: a ReLU network.

    Returns:
        A network with 2 N units: 2 N (r + 4) - 1 parameters, or 6 N of ReLU.

    Raises:
        UnavailableError: f has several variables, or the order is below the degree.
    """
    degree = max(1, n - 1)
    if len(function.frequencies) != 1 or degree > order:
        raise UnavailableError(
            f"One hidden layer makes splines of one variable and of a degree up to the order "
            f"({order}), not of {len(function.frequencies)} variables and degree {degree}; take "
            "the network of local Taylor polynomials."
        )
    builder = Builder(1, order)
    (x,) = builder.inputs
    start, *changes = _knots(function, degree, num_cells)
    total = builder.constant(0.0)
    for j, powers in enumerate(changes):
        shifted = x - float(Fraction(j, num_cells) - 1)
        if order == 1:
            total = total + builder.unit(shifted) * powers[0]
        else:
            total = total + builder.unit(shifted, [start[0] if j == 0 else 0.0, *powers])
    return builder.build([total + start[0] if order == 1 else total])


def spline_bound(n: int, num_cells: int) -> float:
    """Return a bound of the error of the spline for a function whose derivatives are at most 1.

        M h^n / n!,   M = max over [0, 1] of prod_i |s - i / (n - 1)|,   h = 1 / N

    For n = 1, where the spline is linear, h / 2.
    """
    if n == 1:
        return 0.5 / num_cells
    product = np.poly([i / (n - 1) for i in range(n)])
    extremes = np.roots(np.polyder(product))
    return float(np.abs(np.polyval(product, extremes)).max()) / num_cells**n / math.factorial(n)


def _knots(function: Wave, degree: int, num_cells: int) -> list[list[float]]:
    """Return [f(-1)], and for each knot the change of the coefficients of (x - t)^1, (x - t)^2, ..

    In rational arithmetic of the values of f: in fp64 the third differences of neighbouring cells
    would be rounded by 1e-16 N^3, and the sum of all cells would be off by more than its error.
    """
    points = [Fraction(i, degree * num_cells) - 1 for i in range(2 * num_cells * degree + 1)]
    column = torch.tensor([[float(point)] for point in points], dtype=torch.float64)
    values = [Fraction(value) for value in function(column).tolist()]
    width, before = Fraction(1, num_cells), [Fraction(0)] * (degree + 1)
    knots = [[float(values[0])]]
    for j in range(2 * num_cells):
        own = _interpolant(values[j * degree : (j + 1) * degree + 1], degree * num_cells)
        moved = _moved(before, width)
        knots.append([float(a - b) for a, b in zip(own[1:], moved[1:], strict=True)])
        before = own
    return knots


def _interpolant(values: Sequence[Fraction], per_unit: int) -> list[Fraction]:
    """Return the coefficients of the polynomial through values at 0, 1 / m, 2 / m, ..

    Newton's forward differences: q(u) = sum_k (Delta^k y_0) C(u, k), u = m x, m = ``per_unit``.
    """
    differences, basis = list(values), [Fraction(1)]
    total = [Fraction(0)] * len(values)
    for k in range(len(values)):
        for i, b in enumerate(basis):
            total[i] += differences[0] * b
        # C(u, k + 1) = C(u, k) (u - k) / (k + 1)
        raised = [Fraction(0), *basis]
        basis = [(r - k * b) / (k + 1) for r, b in zip(raised, [*basis, Fraction(0)], strict=True)]
        differences = [b - a for a, b in zip(differences, differences[1:], strict=False)]
    return [a * per_unit**i for i, a in enumerate(total)]


def _moved(coefficients: Sequence[Fraction], distance: Fraction) -> list[Fraction]:
    """Return the coefficients of the same polynomial about a point further right."""
    count = len(coefficients)
    return [
        sum(
            (coefficients[i] * math.comb(i, k) * distance ** (i - k) for i in range(k, count)),
            start=Fraction(0),
        )
        for k in range(count)
    ]
