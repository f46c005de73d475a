import numpy as np
import pytest

from megapoly.data.preprocess import length_statistics
from megapoly.data.preprocess.length_statistics import LengthStatistics
from megapoly.errors import DataError

PERCENTILES = {"p01": 1, "p10": 10, "p25": 25, "p50": 50, "p75": 75, "p90": 90, "p99": 99}


def by_sorting(lengths: np.ndarray) -> dict[str, float]:
    ordered = np.sort(lengths)
    values = {name: ordered[p * (len(ordered) - 1) // 100] for name, p in PERCENTILES.items()}
    return {"min": ordered[0], **values, "max": ordered[-1], "mean": ordered.mean()}


def statistics_of(lengths: np.ndarray, chunk: int = 1000) -> LengthStatistics:
    return LengthStatistics(lengths[i : i + chunk] for i in range(0, len(lengths), chunk))


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint16])
@pytest.mark.parametrize("count", [1, 2, 3, 10, 101, 4567])
@pytest.mark.parametrize("chunk", [1, 1000])
def test_everything_is_that_of_the_sorted_lengths(dtype, count, chunk):
    lengths = np.random.default_rng(count).lognormal(6, 2, count).astype(dtype)
    statistics = statistics_of(lengths, chunk)
    quantiles = statistics.quantiles()
    assert quantiles == pytest.approx(by_sorting(lengths), rel=1e-12)
    assert list(quantiles) == ["min", *PERCENTILES, "max", "mean"]
    assert (statistics.count, statistics.sum) == (count, lengths.sum(dtype=np.int64))
    assert (quantiles["min"], quantiles["max"]) == (lengths.min(), lengths.max())
    assert statistics.mean == pytest.approx(lengths.mean(), rel=1e-12)


def test_documents_above_the_array_of_counts(monkeypatch):
    monkeypatch.setattr(length_statistics, "_COUNTED_BY_ARRAY", 50)
    lengths = np.random.default_rng(1).integers(0, 120, 900)
    statistics = statistics_of(lengths)
    assert statistics.quantiles() == pytest.approx(by_sorting(lengths), rel=1e-12)
    for mine, numpys in zip(
        statistics.by_length(), np.unique(lengths, return_counts=True), strict=True
    ):
        assert np.array_equal(mine, numpys)


def test_a_length_beyond_two_to_the_twenty():
    lengths = np.array([5, 1 << 20, (1 << 20) - 1, 3_000_000_000, 0], np.int64)
    assert statistics_of(lengths).quantiles() == pytest.approx(by_sorting(lengths))


def test_lengths_may_be_added_later(monkeypatch):
    monkeypatch.setattr(length_statistics, "_COUNTED_BY_ARRAY", 50)
    lengths = np.random.default_rng(2).integers(0, 120, 300)
    first = statistics_of(lengths[:100])
    first.add(lengths[100:])
    assert first.quantiles() == statistics_of(lengths).quantiles()
    assert (first.count, first.sum) == (300, lengths.sum())


def test_no_documents_and_a_negative_length():
    statistics = statistics_of(np.zeros(0, np.int64))
    statistics.add(np.zeros(0, np.int32))
    assert set(statistics.quantiles().values()) == {0.0}
    assert (statistics.count, statistics.mean) == (0, 0.0)
    with pytest.raises(DataError, match="negative; one is -3.*again"):
        statistics.add(np.array([4, -3]))
    assert statistics.count == 0
