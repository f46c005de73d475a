"""Statistics, curves and shares against numpy, scipy and the formulas written out."""

import numpy as np
import pytest
import scipy.stats
import torch

from megapoly.activations import registry
from megapoly.study.analysis.activation_statistics import ActivationStatistics
from megapoly.study.analysis.histogram import GrowingHistogram
from megapoly.study.analysis.learned_activation import LearnedActivation
from megapoly.study.analysis.row_statistics import RowStatistics

A = [0.1, 0.5, -0.3, 0.2]
EPS = 1e-6


def learned(name, **others):
    activation = registry.get(name)
    values = {"coefficients": torch.tensor(A)} if activation.has_coefficients else {}
    values |= {key: torch.tensor(value) for key, value in others.items()}
    options = {"eps": EPS, "norm": "rms"} if activation.normalized else {}
    return LearnedActivation(activation, values, options)


def rows(num_rows=50, width=64, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((num_rows, width)) * 1.5 + 0.2).astype(np.float32)


def gathered(name, *parts, **others):
    statistics = ActivationStatistics(learned(name, **others))
    for part in parts:
        statistics.add(torch.from_numpy(part))
    return statistics


def test_moments_are_those_of_numpy_and_scipy():
    values = rows() ** 3
    values[:, :20] = 0.0
    values[7] = 0.0
    values[8, 40] = 500.0
    moments = RowStatistics()
    moments.add(torch.from_numpy(values[:30]))
    moments.add(torch.from_numpy(values[30:]))
    found, v = moments.result(), values.astype(np.float64)
    root = np.sqrt((v**2).mean(-1, keepdims=True))
    with np.errstate(invalid="ignore"):
        peaks = np.nan_to_num(np.abs(v).max(-1) / root[:, 0])
    assert found == pytest.approx(
        {
            "mean": v.mean(),
            "rms": np.sqrt((v**2).mean()),
            "kurtosis": scipy.stats.kurtosis(v, axis=None, fisher=False),
            "zero": (v == 0).mean(),
            "near_zero": (np.abs(v) <= 0.01 * root).mean(),
            "outliers": (np.abs(v) > 6 * root).mean(),
            "max_over_rms": peaks.mean(),
            "largest_max_over_rms": peaks.max(),
        }
    )
    assert found["outliers"] > 0 and found["near_zero"] > found["zero"] > 0.3


def test_a_histogram_that_grew_is_that_of_its_last_range():
    small, large = rows(seed=1), 37.0 * rows(seed=2)
    histogram = GrowingHistogram()
    histogram.add(torch.from_numpy(small))
    first_limit = histogram.limit
    histogram.add(torch.from_numpy(large))
    assert histogram.limit >= 16 * first_limit
    both = np.concatenate([small, large])
    expected, _ = np.histogram(both, bins=histogram.edges.numpy())
    # A number at an edge may be on either side.
    assert np.abs(np.cumsum(expected - histogram.counts.numpy())).max() <= 2
    first, last = histogram.bins_between(0.01, 0.99)
    low, high = np.quantile(both, [0.01, 0.99])
    width = 2 * histogram.limit / len(histogram.counts)
    assert histogram.edges[first] == pytest.approx(low, abs=4 * width)
    assert histogram.edges[last] == pytest.approx(high, abs=4 * width)


@pytest.mark.parametrize(("name", "inner"), [("polynorm", lambda x: x), ("polyrelunorm", "relu")])
def test_curve_of_a_normalised_activation_is_at_the_median_norms(name, inner):
    h = (lambda x: np.maximum(x, 0)) if inner == "relu" else inner
    x = rows().astype(np.float64)
    statistics = gathered(name, rows()[:20], rows()[20:])
    curve = statistics.curve()
    # torch's median of an even number is the lower one of the middle.
    roots = [np.sort(np.sqrt((h(x) ** (2 * i)).mean(-1) + EPS)) for i in (1, 2, 3)]
    norms = [root[(len(root) - 1) // 2] for root in roots]
    assert curve["norms"] == pytest.approx(norms, rel=1e-5)
    grid = np.array(curve["x"])
    expected = A[0] + sum(A[i] * h(grid) ** i / norms[i - 1] for i in (1, 2, 3))
    np.testing.assert_allclose(curve["y"], expected, atol=2e-5)


@pytest.mark.parametrize("name", ["polyrelu", "polyprelu", "gelu", "squared_relu", "swiglu"])
def test_curve_of_a_pointwise_activation_is_its_formula(name):
    x = rows(width=128)
    others = {"slope": [0.25]} if name == "polyprelu" else {}
    curve = gathered(name, x, **others).curve()
    g = np.array(curve["x"])
    formulas = {
        "polyrelu": sum(a * np.maximum(g, 0) ** i for i, a in enumerate(A)),
        "polyprelu": sum(a * np.where(g > 0, g, 0.25 * g) ** i for i, a in enumerate(A)),
        "gelu": g * scipy.stats.norm.cdf(g),
        "squared_relu": np.maximum(g, 0) ** 2,
        "swiglu": g / (1 + np.exp(-g)),
    }
    # Six digits are written, of x and of y.
    np.testing.assert_allclose(curve["y"], formulas[name], rtol=3e-5, atol=1e-5)
    assert curve["norms"] is None
    gates = x[:, :64] if name == "swiglu" else x
    assert min(g) == pytest.approx(gates.min(), abs=0.1)
    assert max(g) == pytest.approx(gates.max(), abs=0.1)
    assert np.trapezoid(curve["density"], g) == pytest.approx(1.0, abs=0.01)
    middle = np.array(curve["density"])[np.abs(g - gates.mean()) < 0.5].mean()
    assert middle == pytest.approx((np.abs(gates - gates.mean()) < 0.5).mean(), rel=0.05)


def test_shares_of_powers_are_those_of_their_mean_squares():
    x = rows().astype(np.float64)
    parts = [np.full_like(x, A[0])]
    for i in (1, 2, 3):
        parts.append(A[i] * x**i / np.sqrt((x ** (2 * i)).mean(-1, keepdims=True) + EPS))
    squares = np.array([(part**2).mean() for part in parts])
    expected = squares / squares.sum()
    assert gathered("polynorm", rows()).power_shares() == pytest.approx(expected, rel=1e-5)
    # Each normalised power has mean square 1.
    assert expected == pytest.approx(np.array(A) ** 2 / (np.array(A) ** 2).sum(), rel=1e-4)
    assert gathered("gelu", rows()).power_shares() is None


def test_a_gated_activation_gives_the_product_to_fc2():
    x = rows(width=128)
    found = gathered("swiglu", x).statistics()
    gate, up = x[:, :64].astype(np.float64), x[:, 64:].astype(np.float64)
    product = gate / (1 + np.exp(-gate)) * up
    assert found["before"]["rms"] == pytest.approx(np.sqrt((gate**2).mean()), rel=1e-6)
    assert found["after"]["rms"] == pytest.approx(np.sqrt((product**2).mean()), rel=1e-6)
    assert found["after"]["kurtosis"] == pytest.approx(
        scipy.stats.kurtosis(product, axis=None, fisher=False), rel=1e-5
    )


def test_relu_is_flat_where_it_is_zero():
    x = rows(num_rows=400)
    found = gathered("relu", x).statistics()
    assert found["after"]["zero"] == (x <= 0).mean()
    assert found["flat"] == pytest.approx((x < 0).mean(), abs=1e-3)
    # The logistic function's slope: far out silu's is 1, and it is 0 at -1.278.
    silu = gathered("silu", x).statistics()["flat"]
    grid = x.astype(np.float64)
    s = 1 / (1 + np.exp(-grid))
    slope = s + grid * s * (1 - s)
    flat = np.abs(slope) < 0.01 * np.sqrt((slope**2).mean())
    assert silu == pytest.approx(flat.mean(), abs=1e-3) and silu > 0
