import pytest
import torch

from megapoly.errors import UnavailableError
from megapoly.study.theory import imitation, measure
from megapoly.study.theory.builder import Builder
from megapoly.study.theory.imitation import imitate_network, num_teeth_for, unit_network


def line(points: int, least: float = -1.0) -> torch.Tensor:
    return torch.linspace(least, 1, points, dtype=torch.float64)[:, None]


@pytest.mark.parametrize("num_teeth", [1, 2, 5, 9])
def test_square_is_the_interpolant(num_teeth: int) -> None:
    builder = Builder(1, order=1)
    network = builder.build([imitation.square(builder.inputs[0], num_teeth)])
    knots = line(2**num_teeth + 1, 0.0)
    middles = (knots[1:] + knots[:-1]) / 2
    assert torch.equal(network(knots), knots**2)
    excess = network(middles) - middles**2
    torch.testing.assert_close(excess, torch.full_like(excess, 0.25 ** (num_teeth + 1)))
    # x itself is the sum that the first layer carries.
    assert (network.size.units, network.size.depth) == (3 * num_teeth - 1, num_teeth)


def test_product_is_bounded_and_0_at_0() -> None:
    num_teeth = 6
    builder = Builder(2, order=1)
    network = builder.build([imitation.product(*builder.inputs, num_teeth)])
    side = torch.linspace(-1, 1, 97, dtype=torch.float64)
    points = torch.cartesian_prod(side, side)
    values = network(points)[:, 0]
    exact = points.prod(1)
    assert (values - exact).abs().max() <= 0.25 ** (num_teeth + 1)
    assert (values - exact).abs().max() > 0.25 ** (num_teeth + 2)
    assert torch.equal(values[exact == 0], exact[exact == 0].abs())
    assert values.abs().max() <= 1
    # The arguments, |u + v| and |u - v|, are 4 units; each square takes 3 m - 1.
    assert network.size.units == 4 + 2 * (3 * num_teeth - 1)


@pytest.mark.parametrize("coefficients", [(0.5, -1, 1), (1, 1, 1, 1), (0, 1, -0.3, 0.2, -1)])
def test_unit_within_eps(coefficients: tuple[float, ...]) -> None:
    x = line(20_011)
    exact = sum(a * x.clamp(min=0) ** i for i, a in enumerate(coefficients))
    for eps in (0.5, 1e-2, 1e-5, 1e-9):
        error = (unit_network(coefficients, eps)(x) - exact).abs().max()
        assert error < eps


def test_no_more_teeth_than_needed() -> None:
    # x^2 alone: its error is 4^-(m + 1) and no less.
    x = line(4097, 0.0)
    for eps in (1e-2, 1e-4, 1e-6):
        num_teeth = num_teeth_for((0, 0, 1), eps)
        builder = Builder(1, order=1)
        value = imitation.imitate_unit(builder.inputs[0], (0, 0, 1), num_teeth - 1)
        if num_teeth > 1:
            assert (builder.build([value])(x) - x**2).abs().max() >= eps


def test_size_is_linear_in_ln_eps() -> None:
    results = measure.lemma_2([10.0**-k for k in range(1, 8)], orders=[3])
    assert all(result["error"] < result["eps"] for result in results)
    line = measure.line_in_log(results)
    assert line["distance"] < 0.1
    # A tooth divides the error by 4 and takes, for order 3, 33 parameters.
    assert line["c_1"] == pytest.approx(33 / torch.log(torch.tensor(4.0)).item(), rel=0.03)
    falling = [result["parameters_by_log_squared"] for result in results]
    assert falling == sorted(falling, reverse=True)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_network_within_eps(depth: int) -> None:
    teacher = measure.random_network(depth, width=3)
    points = 2 * torch.rand(500, 2, dtype=torch.float64) - 1
    exact = teacher(points)
    assert exact.max() - exact.min() > 0.01
    sizes = []
    for eps in (1e-2, 1e-4, 1e-6):
        network = imitate_network(teacher, eps)
        assert (network(points) - exact).abs().max() < eps
        sizes.append(network.size.parameters)
    assert sizes[2] - sizes[1] == pytest.approx(sizes[1] - sizes[0], rel=0.2)


def test_condition_of_the_theorem_is_checked() -> None:
    builder = Builder(1, order=2)
    (x,) = builder.inputs
    heavy = builder.build([builder.unit(x * 2.0, (0, 1, 0))])
    with pytest.raises(UnavailableError, match="Layer 1 has a unit whose weights' and bias's"):
        imitate_network(heavy, 0.1)
    builder = Builder(1, order=2)
    (x,) = builder.inputs
    large = builder.build([builder.unit(x, (0, 1, 1))])
    with pytest.raises(UnavailableError, match="coefficients' absolute values sum to 2"):
        imitate_network(large, 0.1)
