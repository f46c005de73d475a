import math

import numpy as np
import pytest
import torch
from scipy.interpolate import BarycentricInterpolator

from megapoly.errors import UnavailableError
from megapoly.study.theory import measure
from megapoly.study.theory.network import Network
from megapoly.study.theory.smooth import Wave
from megapoly.study.theory.spline import spline_bound, spline_network

FUNCTION = Wave((1.0,), 0.3)
X = torch.linspace(-1, 1, 2003, dtype=torch.float64)[:, None]


def evaluated(network: Network) -> np.ndarray:
    return network(X)[:, 0].numpy()


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("num_cells", [1, 5, 64])
def test_linear_spline_is_that_of_numpy(order: int, num_cells: int) -> None:
    knots = np.linspace(-1, 1, 2 * num_cells + 1)
    expected = np.interp(X[:, 0].numpy(), knots, np.sin(knots + 0.3))
    found = evaluated(spline_network(FUNCTION, 2, num_cells, order))
    assert np.abs(found - expected).max() < 1e-14


@pytest.mark.parametrize(("n", "order"), [(3, 2), (3, 3), (4, 3), (5, 4)])
@pytest.mark.parametrize("num_cells", [1, 7, 64])
def test_each_piece_interpolates(n: int, order: int, num_cells: int) -> None:
    x = X[:, 0].numpy()
    expected = np.empty_like(x)
    for j in range(2 * num_cells):
        left = -1 + j / num_cells
        nodes = left + np.arange(n) / ((n - 1) * num_cells)
        inside = (x >= left - 1e-12) & (x <= left + 1 / num_cells + 1e-12)
        expected[inside] = BarycentricInterpolator(nodes, np.sin(nodes + 0.3))(x[inside])
    found = evaluated(spline_network(FUNCTION, n, num_cells, order))
    assert np.abs(found - expected).max() < 1e-14


@pytest.mark.parametrize("n", [2, 3, 4])
def test_error_is_within_the_bound_and_near_it(n: int) -> None:
    """The largest n-th derivative of sin on the interval is near 1."""
    results = measure.theorem_3(1, n, [4, 16, 64], "PolyReLU, one layer")
    for result in results:
        assert 0.8 * result["bound"] < result["error"] < result["bound"]
    assert measure.slope(results, x="N") == pytest.approx(-n, rel=0.02)


def test_bounds_have_the_known_maxima() -> None:
    # A zigzag of slopes 1 and -1 between two nodes is h / 2 off the line at most.
    assert spline_bound(1, 8) == 1 / 16
    for n, largest in ((2, 1 / 4), (3, math.sqrt(3) / 36), (4, 1 / 81)):
        assert spline_bound(n, 5) == pytest.approx(largest / 5**n / math.factorial(n))


@pytest.mark.parametrize("num_cells", [1, 6, 64])
def test_parameters_are_counted_as_in_the_other_networks(num_cells: int) -> None:
    """A weight and a bias for each unit, one of which is 0 at the knot 0, and a weight of it."""
    relu = spline_network(FUNCTION, 2, num_cells, order=1).size
    assert (relu.depth, relu.units, relu.parameters) == (1, 2 * num_cells, 6 * num_cells)
    for order in (2, 3, 4):
        size = spline_network(FUNCTION, 3, num_cells, order).size
        assert (size.depth, size.units) == (1, 2 * num_cells)
        assert size.parameters == 2 * num_cells * (order + 4) - 1


def test_one_layer_takes_a_small_part_of_the_parameters_for_the_same_error() -> None:
    for n, kind in ((2, "PolyReLU"), (4, "PolyReLU"), (2, "ReLU")):
        (local,) = measure.theorem_3(1, n, [16], kind)
        (spline,) = measure.theorem_3(1, n, [16], f"{kind}, one layer")
        assert spline["error"] < 1.01 * local["error"]
        assert spline["parameters"] < local["parameters"] / 8


def test_what_one_layer_cannot_make_is_refused() -> None:
    with pytest.raises(
        UnavailableError, match=r"up to the order \(1\), not of 1 variables and deg"
    ):
        spline_network(FUNCTION, 3, 4, order=1)
    with pytest.raises(UnavailableError, match="2 variables and degree 1"):
        spline_network(Wave((1.0, 0.5), 0.0), 2, 4)
