from fractions import Fraction

import numpy as np
import pytest
import torch

from megapoly.study.theory.builder import Builder
from megapoly.study.theory.powers import polynomial, power_network, power_units, product


def test_polynomial_activation_is_two_units() -> None:
    coefficients = (0.7, -1.5, 0.25, 2.0)
    builder = Builder(1, order=3)
    network = builder.build([polynomial(builder.inputs[0], coefficients)])
    x = torch.linspace(-2, 2, 401, dtype=torch.float64)
    expected = np.polynomial.polynomial.polyval(x.numpy(), coefficients)
    np.testing.assert_allclose(network(x[:, None])[:, 0], expected, rtol=1e-12, atol=1e-13)
    assert network.size.units == 2


def test_product_is_exact() -> None:
    builder = Builder(2, order=2)
    network = builder.build([product(*builder.inputs)])
    assert network.exactly([Fraction(-7, 3), Fraction(5, 11)]) == [Fraction(-35, 33)]
    assert network.size.units == 4


@pytest.mark.parametrize("order", [2, 3, 4])
def test_power_is_exact_for_every_exponent(order: int) -> None:
    for n in [*range(41), 81, 100, 255, 1000]:
        network = power_network(n, order)
        for x in (Fraction(-5, 3), Fraction(2, 7), Fraction(0)):
            assert network.exactly([x]) == [x**n], n
        if n:
            assert network.size.units <= power_units(n, order)


@pytest.mark.parametrize("order", [2, 3, 4])
def test_power_in_fp64(order: int) -> None:
    x = torch.linspace(-1, 1, 401, dtype=torch.float64)[:, None]
    for n in (2, 7, 26, 100):
        error = (power_network(n, order)(x) - x**n).abs().max()
        assert error < 1e-12  # relative to 1, the largest value


@pytest.mark.parametrize(
    ("n", "order", "units", "depth"),
    [
        (1, 2, 2, 1),  # one pair
        (8, 2, 2 * 3 + 2, 4),  # three squares, and the digit 1 at the end
        (7, 2, 8 * 2 + 4, 4),  # digits 1 1 1: the bound
        (26, 3, 8 * 2 + 4, 4),  # digits 2 2 2
        (255, 4, 8 * 3 + 4, 5),  # digits 3 3 3 3
        (2**40 - 1, 2, 8 * 39 + 4, 41),
    ],
)
def test_size_of_a_power(n: int, order: int, units: int, depth: int) -> None:
    size = power_network(n, order).size
    assert (size.units, size.depth) == (units, depth)
    assert size.coefficients == (order + 1) * units
    assert size.width <= 8
    if n > 8 or n == 7:
        assert power_units(n, order) == units


def test_parameters_of_x_to_the_8() -> None:
    # Each of 4 pairs of units reads the pair before, 4 weights, but for the first, 2; the output 2.
    size = power_network(8, 2).size
    assert size.weights == 2 + 3 * 4 + 2
    assert size.parameters == 16 + 3 * 8
