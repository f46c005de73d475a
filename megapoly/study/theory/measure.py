"""Errors and sizes of the networks that :mod:`megapoly.study.theory` builds."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from megapoly.polynomial import DEFAULT_ORDER, ORDERS
from megapoly.study.theory.builder import Builder, Value
from megapoly.study.theory.equality import relu_to_polyrelu
from megapoly.study.theory.imitation import imitate_network, unit_network
from megapoly.study.theory.network import Network
from megapoly.study.theory.powers import paper_power_units, power_network, power_units
from megapoly.study.theory.smooth import (
    Wave,
    error_bound,
    polyrelu_network,
    relu_network,
    taylor_sum,
)
from megapoly.study.theory.spline import spline_bound, spline_network

Numbers = dict[str, Any]

# Primes, so that the points are at different places in the cells of any grid.
GRID = {1: 4001, 2: 151}
# Networks of theorem_3: local Taylor polynomials, and splines in one hidden layer.
CONSTRUCTIONS: dict[str, Callable[[Wave, int, int], Network]] = {
    "PolyReLU": polyrelu_network,
    "ReLU": relu_network,
    "PolyReLU, one layer": spline_network,
    "ReLU, one layer": functools.partial(spline_network, order=1),
}
ONE_LAYER = ("PolyReLU, one layer", "ReLU, one layer")
WAVES = {1: Wave((1.0,), 0.3), 2: Wave((1.0, 0.8), 0.3)}


class Residual(nn.Module):
    """ReLU(x + V ReLU(W x)); the outer ReLU is a method of the tensor."""

    def __init__(self, width: int):
        super().__init__()
        self.inner = nn.Linear(width, 2 * width)
        self.outer = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[.., width] -> [.., width]."""
        return (x + self.outer(torch.relu(self.inner(x)))).relu()


def architectures() -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    """Return small ReLU networks and the shapes of their inputs."""
    torch.manual_seed(0)
    networks: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
        "MLP": (
            nn.Sequential(
                nn.Linear(1, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 1)
            ),
            (401, 1),
        ),
        "residual": (nn.Sequential(Residual(8), Residual(8)), (401, 8)),
        "convolution": (
            nn.Sequential(
                nn.Conv1d(2, 6, 3, padding=1), nn.ReLU(), nn.Conv1d(6, 2, 3, padding=1), nn.ReLU()
            ),
            (50, 2, 16),
        ),
    }
    return {name: (network.double(), shape) for name, (network, shape) in networks.items()}


def theorem_1(orders: Sequence[int] = ORDERS) -> list[Numbers]:
    """Measure the difference between each architecture and its PolyReLU network, and both sizes."""
    results = []
    for name, (network, shape) in architectures().items():
        x = 2 * torch.rand(shape, dtype=torch.float64) - 1
        if x.shape[-1] == 1:
            x = torch.linspace(-1, 1, len(x), dtype=torch.float64)[:, None]
        for order in orders:
            twin = relu_to_polyrelu(network, order)
            with torch.no_grad():
                f, g = network(x), twin(x)
            entry = {
                "architecture": name,
                "order": order,
                "relu_parameters": _num_parameters(network),
                "polyrelu_parameters": _num_parameters(twin),
                "largest_difference": _sup(f - g),
            }
            if shape[1:] == (1,):
                entry |= {"x": x[:, 0].tolist(), "f": f[:, 0].tolist(), "g": g[:, 0].tolist()}
            results.append(entry)
    return results


def lemma_a4(exponents: Sequence[int], orders: Sequence[int] = (2, 3)) -> list[Numbers]:
    """Measure units of x^n, exactness at rational points, and the error in fp64 on [-1, 1]."""
    points = [Fraction(-5, 3), Fraction(1, 7), Fraction(2)]
    x = torch.linspace(-1, 1, 201, dtype=torch.float64)[:, None]
    results = []
    for order in orders:
        for n in exponents:
            network = power_network(n, order)
            results.append(
                {
                    "order": order,
                    "n": n,
                    **asdict(network.size),
                    "parameters": network.size.parameters,
                    "most_units": power_units(n, order),
                    "paper_polynomial_units": paper_power_units(n, order),
                    "exact": all(network.exactly([q]) == [q**n] for q in points),
                    "error": _sup(network(x) - x**n),
                }
            )
    return results


def lemma_2(tolerances: Sequence[float], orders: Sequence[int] = ORDERS) -> list[Numbers]:
    """Measure error and size of ReLU networks that approximate sum_i ReLU(x)^i on [-1, 1]."""
    x = torch.linspace(-1, 1, 50_021, dtype=torch.float64)[:, None]
    h = x.clamp(min=0)
    results = []
    for order in orders:
        exact = sum(h**i for i in range(order + 1))
        for eps in tolerances:
            network = unit_network([1.0] * (order + 1), eps)
            results.append(
                {"group": f"order {order}", **_imitation(network, eps, network(x) - exact)}
            )
    return results


def theorem_2(
    tolerances: Sequence[float], depths: Sequence[int] = (1, 2, 3), width: int = 3
) -> list[Numbers]:
    """Measure ReLU networks that approximate random PolyReLU networks of order 3, d = 2."""
    side = torch.linspace(-1, 1, 41, dtype=torch.float64)
    x = torch.cartesian_prod(side, side)
    results = []
    for depth in depths:
        teacher = random_network(depth, width)
        exact = teacher(x)
        for eps in tolerances:
            network = imitate_network(teacher, eps)
            numbers = _imitation(network, eps, network(x) - exact)
            results.append({"group": f"depth {depth}", **numbers})
    return results


def random_network(depth: int, width: int, order: int = DEFAULT_ORDER, seed: int = 0) -> Network:
    """Return a PolyReLU network of two inputs that meets the conditions of Theorem 2."""
    generator = torch.Generator().manual_seed(seed)

    def unit_norm(size: int) -> list[float]:
        a = 2 * torch.rand(size, dtype=torch.float64, generator=generator) - 1
        return (a / a.abs().sum()).tolist()

    def positive_bias(size: int) -> list[float]:
        """Return weights and a positive bias, so that most units are not 0 everywhere."""
        *weights, bias = unit_norm(size)
        return [*weights, abs(bias)]

    builder = Builder(2, order)

    def affine(values: Sequence[Value], numbers: Sequence[float]) -> Value:
        total = builder.constant(numbers[-1])
        for value, weight in zip(values, numbers[:-1], strict=True):
            total = total + value * weight
        return total

    values = builder.inputs
    for _ in range(depth):
        values = [
            builder.unit(affine(values, positive_bias(len(values) + 1)), unit_norm(order + 1))
            for _ in range(width)
        ]
    return builder.build([affine(values, [*unit_norm(width), 0.0])])


def theorem_3(d: int, n: int, all_cells: Sequence[int], kind: str) -> list[Numbers]:
    """Measure sup error on a grid and size of the networks of a kind.

    Args:
        d: number of variables.
        n: order up to which derivatives are at most 1.
        all_cells: N, cells on either side of 0.
        kind: key of :data:`CONSTRUCTIONS`.
    """
    function = WAVES[d]
    side = torch.linspace(-1, 1, GRID[d], dtype=torch.float64)
    x = torch.cartesian_prod(*[side] * d).reshape(-1, d)
    results = []
    for num_cells in all_cells:
        network = CONSTRUCTIONS[kind](function, n, num_cells)
        y = network(x)[:, 0]
        numbers = {
            "d": d,
            "n": n,
            "kind": kind,
            "N": num_cells,
            **asdict(network.size),
            "parameters": network.size.parameters,
            "error": _sup(y - function(x)),
        }
        if kind in ONE_LAYER:
            numbers["bound"] = spline_bound(n, num_cells)
        else:
            numbers["bound"] = error_bound(n, d, num_cells)
            numbers["from_taylor_sum"] = _sup(y - taylor_sum(function, n, num_cells, x))
        results.append(numbers)
    return results


def slope(results: Sequence[Numbers], x: str = "parameters", y: str = "error") -> float:
    """Return the least-squares slope of ln y on ln x."""
    a = torch.tensor([math.log(r[x]) for r in results], dtype=torch.float64)
    b = torch.tensor([math.log(r[y]) for r in results], dtype=torch.float64)
    a, b = a - a.mean(), b - b.mean()
    return float((a @ b) / (a @ a))


def line_in_log(results: Sequence[Numbers]) -> Numbers:
    """Fit parameters = c_0 + c_1 ln(1 / eps).

    Returns:
        c_0, c_1 and the largest relative distance of a point from the line.
    """
    logs = torch.tensor([-math.log(r["eps"]) for r in results], dtype=torch.float64)
    sizes = torch.tensor([r["parameters"] for r in results], dtype=torch.float64)
    table = torch.stack([torch.ones_like(logs), logs], 1)
    line = torch.linalg.lstsq(table, sizes[:, None]).solution
    distance = ((table @ line)[:, 0] / sizes - 1).abs().max()
    return {"c_0": float(line[0]), "c_1": float(line[1]), "distance": float(distance)}


def _imitation(network: Network, eps: float, difference: Tensor) -> Numbers:
    size = network.size
    return {
        "eps": eps,
        **asdict(size),
        "parameters": size.parameters,
        "error": _sup(difference),
        "parameters_by_log": size.parameters / -math.log(eps),
        "parameters_by_log_squared": size.parameters / math.log(eps) ** 2,
    }


def _num_parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def _sup(difference: Tensor) -> float:
    return float(difference.abs().max())
