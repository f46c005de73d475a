import math

import pytest
import torch

from megapoly.study.theory import measure
from megapoly.study.theory.smooth import (
    Wave,
    multi_indices,
    polyrelu_network,
    relu_network,
    taylor_sum,
)


def test_derivatives_of_the_wave() -> None:
    wave = Wave((1.0, 0.8), 0.3)
    point = torch.tensor([[0.4, -0.7]], dtype=torch.float64, requires_grad=True)
    gradient = torch.autograd.grad(wave(point).sum(), point, create_graph=True)[0]
    mixed = torch.autograd.grad(gradient[0, 0], point)[0]
    at = (0.4, -0.7)
    assert wave.derivative((0, 0), at) == pytest.approx(wave(point).item())
    assert wave.derivative((0, 1), at) == pytest.approx(gradient[0, 1].item())
    assert wave.derivative((1, 1), at) == pytest.approx(mixed[0, 1].item())


@pytest.mark.parametrize(("n", "d", "count"), [(1, 1, 1), (4, 1, 4), (3, 2, 6), (3, 3, 10)])
def test_number_of_monomials(n: int, d: int, count: int) -> None:
    indices = multi_indices(n, d)
    assert len(set(indices)) == len(indices) == count == math.comb(n + d - 1, d)


@pytest.mark.parametrize(("d", "n", "order"), [(1, 1, 3), (1, 4, 2), (1, 5, 3), (2, 3, 2)])
def test_polyrelu_equals_the_taylor_sum(d: int, n: int, order: int) -> None:
    function = Wave((1.0, 0.8)[:d], 0.3)
    points = 2 * torch.rand(300, d, dtype=torch.float64) - 1
    network = polyrelu_network(function, n, num_cells=3, order=order)
    expected = taylor_sum(function, n, 3, points)
    assert (network(points)[:, 0] - expected).abs().max() < 1e-12


def test_taylor_sum_is_the_polynomial_where_one_bump_is_1() -> None:
    # Within 1 / (3 N) of a centre; of degree 1: f(c) + f'(c) (x - c).
    function = Wave((1.0,), 0.3)
    x = torch.tensor([[0.5 + 0.1]], dtype=torch.float64)
    expected = math.sin(0.8) + 0.1 * math.cos(0.8)
    assert taylor_sum(function, 2, 2, x).item() == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize("n", [2, 3, 4])
def test_slope_in_one_dimension(n: int) -> None:
    results = measure.theorem_3(1, n, [4, 8, 16, 32], "PolyReLU")
    assert all(result["error"] < result["bound"] for result in results)
    # 2 N + 1 cells and not 2 N: the slope is a little steeper than -n.
    assert -1.1 * n < measure.slope(results) < -n


def test_slope_in_two_dimensions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(measure.GRID, 2, 67)
    results = measure.theorem_3(2, 2, [2, 4, 8], "PolyReLU")
    assert all(result["error"] < result["bound"] for result in results)
    assert -1.2 < measure.slope(results) < -1


def test_relu_needs_a_logarithm_more() -> None:
    cells = [4, 8, 16, 32]
    relu = measure.theorem_3(1, 3, cells, "ReLU")
    polyrelu = measure.theorem_3(1, 3, cells, "PolyReLU")
    # Taylor's error and, at most as much, that of the products.
    assert all(result["error"] < 2 * result["bound"] for result in relu)
    ratios = [a["parameters"] / b["parameters"] for a, b in zip(relu, polyrelu, strict=True)]
    assert ratios == sorted(ratios)
    # Like ln(1 / eps), n ln N: for each doubling of N the same step, n / 2 teeth.
    steps = [b - a for a, b in zip(ratios, ratios[1:], strict=False)]
    assert sum(steps) / 3 == pytest.approx(0.57, rel=0.2)
    assert -3 < measure.slope(relu) < -2


def test_size_in_one_dimension() -> None:
    # A cell, n = 2, order 3: 3 units of the bump, 2 of x - m / N, 2 that carry the polynomial to
    # the bump's layer, 4 of their product.
    for num_cells in (2, 5):
        network = polyrelu_network(Wave((1.0,), 0.3), 2, num_cells)
        assert network.size.units == 11 * (2 * num_cells + 1)
        assert network.size.depth == 3


def test_far_bumps_add_nothing_to_the_relu_network() -> None:
    # With 33 cells, errors of products with 0 would add up.
    function = Wave((1.0,), 0.3)
    x = torch.linspace(-1, 1, 501, dtype=torch.float64)[:, None]
    network = relu_network(function, 2, 16)
    assert (network(x)[:, 0] - function(x)).abs().max() < 2 * (2 / 48) ** 2 / 2
