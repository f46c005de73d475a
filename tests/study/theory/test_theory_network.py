import pytest
import torch

from megapoly.errors import ShapeError
from megapoly.ops import polyrelu
from megapoly.study.theory.builder import Builder
from megapoly.study.theory.network import Size


def test_unit_is_the_operator() -> None:
    coefficients = (0.3, -1.0, 0.5, 2.0)
    builder = Builder(1, order=3)
    network = builder.build([builder.unit(builder.inputs[0], coefficients)])
    x = torch.linspace(-2, 2, 301, dtype=torch.float64)[:, None]
    a = torch.tensor(coefficients, dtype=torch.float64)
    torch.testing.assert_close(network(x), polyrelu(x, a, backend="reference"))


def test_counts_by_hand() -> None:
    builder = Builder(2, order=2)
    x, y = builder.inputs
    first = builder.unit(x + 2 * y + 1.0)  # 2 weights, a bias
    second = builder.unit(first - 3.0, (0.0, 0.0, 1.0))  # 1 weight, a bias
    # x is carried by two units in each of two layers: 2 + 4 weights; the output has 3, no bias.
    network = builder.build([second + x])
    assert network.size == Size(depth=2, width=3, units=6, weights=14, coefficients=18)
    assert network.size.parameters == 32
    points = torch.tensor([[1.0, 2.0], [-1.5, 0.5]], dtype=torch.float64)
    expected = torch.tensor([[(1 + 4 + 1 - 3) ** 2 + 1.0], [-1.5]], dtype=torch.float64)
    assert torch.equal(network(points), expected)


def test_equal_units_are_shared() -> None:
    builder = Builder(1, order=1)
    (x,) = builder.inputs
    network = builder.build([builder.unit(x + 1.0) + builder.unit(x + 1.0) + builder.unit(x)])
    assert network.size.units == 2
    assert network(torch.tensor([[2.0]])).item() == 8


def test_order_1_has_no_coefficients_to_count() -> None:
    builder = Builder(1, order=1)
    network = builder.build([builder.unit(builder.inputs[0])])
    assert network.size.parameters == 2


def test_other_shapes_are_refused() -> None:
    builder = Builder(2, order=1)
    network = builder.build(builder.inputs)
    with pytest.raises(ShapeError, match=r"takes \[points, 2\], not \[3\]"):
        network(torch.zeros(3))
