import math

import numpy as np
import pytest
import scipy.stats

from megapoly.study.report.two_way import fit


def made(num_lines: int, num_seeds: int, generator: np.random.Generator) -> np.ndarray:
    lines = generator.normal(size=(num_lines, 1))
    return (
        4
        + lines
        + generator.normal(size=num_seeds)
        + generator.normal(scale=0.5, size=(num_lines, num_seeds))
    )


@pytest.mark.parametrize(("num_lines", "num_seeds"), [(2, 2), (5, 3), (3, 5)])
def test_model_is_least_squares_on_indicators(num_lines: int, num_seeds: int) -> None:
    y = made(num_lines, num_seeds, np.random.default_rng(num_lines))
    # A column for each line, and one for each seed but the first.
    lines = np.repeat(np.eye(num_lines), num_seeds, 0)
    seeds = np.tile(np.eye(num_seeds), (num_lines, 1))[:, 1:]
    design = np.hstack([lines, seeds])
    solution, squares, rank, _ = np.linalg.lstsq(design, y.ravel(), rcond=None)
    found = fit(y.tolist())
    assert rank == design.shape[1]
    assert found.degrees == y.size - rank
    # Squares are empty where the residual is exactly determined by rank; compute them then.
    residual = y.ravel() - design @ solution
    assert found.deviation == pytest.approx(math.sqrt(residual @ residual / found.degrees))
    gaps = np.subtract.outer(found.means, found.means)
    assert gaps == pytest.approx(np.subtract.outer(solution[:num_lines], solution[:num_lines]))
    assert found.means == pytest.approx(y.mean(1))


# Studentized range at 5 %, from the table of Harter (1960).
@pytest.mark.parametrize(
    ("num_lines", "num_seeds", "quantile"), [(3, 6, 3.877), (5, 5, 4.333), (4, 3, 4.896)]
)
def test_interval_is_that_of_tukey(num_lines: int, num_seeds: int, quantile: float) -> None:
    found = fit(made(num_lines, num_seeds, np.random.default_rng(7)).tolist())
    expected = quantile * found.deviation / math.sqrt(num_seeds)
    assert found.half_interval == pytest.approx(expected, rel=2e-4)


@pytest.mark.parametrize("num_seeds", [2, 3, 8])
def test_two_lines_have_the_interval_of_paired_differences(num_seeds: int) -> None:
    y = made(2, num_seeds, np.random.default_rng(num_seeds))
    low, high = scipy.stats.ttest_rel(*y).confidence_interval(0.95)
    assert fit(y.tolist()).half_interval == pytest.approx((high - low) / 2, rel=1e-6)


def test_one_of_twenty_families_of_equal_lines_is_distinguished() -> None:
    """Simultaneous: of 2,000 sets of four equal lines, 5 % have any difference that counts."""
    generator = np.random.default_rng(0)
    false = 0
    for _ in range(2000):
        y = generator.normal(size=3) + generator.normal(size=(4, 3))
        found = fit(y.tolist())
        false += max(found.means) - min(found.means) > found.half_interval
    assert false / 2000 == pytest.approx(0.05, abs=3 * math.sqrt(0.05 * 0.95 / 2000))


def test_correlation_is_that_of_shrout_and_fleiss() -> None:
    """Their Table 2: four judges of six targets; Table 4: ICC(3, 1) = .71."""
    targets = [[9, 2, 5, 8], [6, 1, 3, 2], [8, 4, 6, 8], [7, 1, 2, 6], [10, 5, 6, 9], [6, 2, 4, 7]]
    judges = [[float(scores[judge]) for scores in targets] for judge in range(4)]
    found = fit(judges).correlation
    assert found is not None and round(found, 2) == 0.71


def test_results_without_noise() -> None:
    """Line and seed explain everything: no interval, and runs of a seed are alike."""
    found = fit([[1.0, 2.0, 4.0], [1.5, 2.5, 4.5]])
    assert (found.half_interval, found.deviation, found.correlation) == (0.0, 0.0, 1.0)
    equal = fit([[2.0, 2.0], [2.0, 2.0]])
    assert (equal.half_interval, equal.correlation) == (0.0, None)
