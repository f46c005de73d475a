"""Means with their spread, and what is read off a curve."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# Two-sided 95 % quantiles of Student's t for 1 .. 30 degrees of freedom.
_STUDENT = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)


@dataclass(frozen=True)
class SeedStatistics:
    """Values of several seeds.

    Args:
        mean: of them.
        deviation: standard deviation with n - 1; None of a single value.
        count: n.
    """

    mean: float
    deviation: float | None
    count: int

    @property
    def error(self) -> float | None:
        """Standard error of the mean, deviation / sqrt(n)."""
        return None if self.deviation is None else self.deviation / math.sqrt(self.count)

    @property
    def half_interval(self) -> float | None:
        """Half of the mean's 95 % interval, t(n - 1) error; beyond 31 values t stays at 2.042."""
        error = self.error
        if error is None:
            return None
        return _STUDENT[min(self.count - 1, len(_STUDENT)) - 1] * error


def seed_statistics(values: Sequence[float]) -> SeedStatistics | None:
    """Mean and standard deviation; None of nothing."""
    if not values:
        return None
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return SeedStatistics(mean, None, 1)
    squares = math.fsum((value - mean) ** 2 for value in values)
    return SeedStatistics(mean, math.sqrt(squares / (len(values) - 1)), len(values))


def paired(
    values: Mapping[str, float | None], reference: Mapping[str, float | None]
) -> dict[str, float]:
    """Differences to the reference by seed, of the seeds for which both have a value."""
    return {
        seed: value - other
        for seed, value in values.items()
        if value is not None and (other := reference.get(seed)) is not None
    }


def trailing_mean(values: Sequence[float], window: int) -> list[float]:
    """Mean of each value and those before it, ``window`` in all, or as many as there are."""
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    # Differences of running sums lose about 1e-16 of a sum; a value that is not finite would stay
    # in them.
    if math.isfinite(sums[-1]):
        return [(sums[i] - sums[max(0, i - window)]) / min(i, window) for i in range(1, len(sums))]
    return [
        math.fsum(part) / len(part)
        for i in range(len(values))
        if (part := values[max(0, i + 1 - window) : i + 1])
    ]


def thinned(count: int, most: int) -> list[int]:
    """At most ``most`` of the indices 0 .. count - 1, evenly spaced, both ends among them."""
    if count <= most:
        return list(range(count))
    return [round(i * (count - 1) / (most - 1)) for i in range(most)]


def first_crossing(
    tokens: Sequence[int], losses: Sequence[float | None], target: float
) -> float | None:
    """Where a curve first is at or below ``target``, linear between its points.

    Returns:
        Tokens; those of the first point where this is below already; None: never.
    """
    before: tuple[int, float] | None = None
    for token, loss in zip(tokens, losses, strict=True):
        if loss is None:
            before = None
            continue
        if loss <= target:
            if before is None or before[1] == loss:
                return float(token)
            return before[0] + (token - before[0]) * (before[1] - target) / (before[1] - loss)
        before = (token, loss)
    return None
