import math
import statistics

import pytest

from megapoly.study.report.statistics import (
    first_crossing,
    paired,
    seed_statistics,
    thinned,
    trailing_mean,
)


def test_spread_is_that_of_the_statistics_module():
    values = [3.2, 3.5, 3.1, 3.9]
    found = seed_statistics(values)
    assert found.mean == pytest.approx(statistics.mean(values))
    assert found.deviation == pytest.approx(statistics.stdev(values))
    assert found.count == 4


def test_spread_of_one_and_of_none():
    one = seed_statistics([2.0])
    assert (one.deviation, one.count) == (None, 1)
    assert seed_statistics([]) is None


def test_paired_takes_the_seeds_that_both_have():
    found = paired({"1": 3.0, "2": 4.0, "3": None, "4": 1.0}, {"1": 2.5, "2": 4.5, "3": 1.0})
    assert found == {"1": 0.5, "2": -0.5}


def test_trailing_mean():
    assert trailing_mean([4.0, 2.0, 6.0, 8.0], 2) == pytest.approx([4.0, 3.0, 4.0, 7.0])
    assert trailing_mean([1.0, math.nan, 3.0, 5.0], 2)[3] == 4.0


def test_thinned_keeps_both_ends():
    assert thinned(3, 5) == [0, 1, 2]
    assert thinned(101, 5) == [0, 25, 50, 75, 100]


def test_crossing_is_linear_between_points():
    tokens, losses = [100, 200, 300], [5.0, 4.0, 3.0]
    assert first_crossing(tokens, losses, 3.25) == pytest.approx(275)
    assert first_crossing(tokens, losses, 4.0) == 200
    assert first_crossing(tokens, losses, 2.9) is None
    assert first_crossing(tokens, losses, 6.0) == 100
    assert first_crossing(tokens, losses, 3.0) == 300


def test_first_crossing_of_a_curve_that_comes_back():
    assert first_crossing([0, 10, 20, 30], [4.0, 2.0, 4.0, 1.0], 3.0) == 5


def test_crossing_does_not_pass_through_a_gap():
    assert first_crossing([0, 10, 20], [4.0, None, 2.0], 3.0) == 20
