"""Statistics of repeated measurements of a benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True)
class RoundStatistics:
    """Median, lowest and highest of the rounds."""

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> RoundStatistics:
        """Return the statistics of the values of all rounds."""
        return cls(median(values), min(values), max(values))


def digits(value: float) -> str:
    """Format a number with at least three significant digits and no exponent."""
    return f"{value:,.{3 if value < 1 else 2 if value < 10 else 1 if value < 100 else 0}f}"
