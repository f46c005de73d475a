"""Means with their spread, and quantities that are read from a curve."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class SeedStatistics:
    """Mean and spread of values of several seeds.

    Args:
        mean: of the values.
        deviation: standard deviation with n - 1; None for a single value.
        count: n.
    """

    mean: float
    deviation: float | None
    count: int


def seed_statistics(values: Sequence[float]) -> SeedStatistics | None:
    """Return mean and standard deviation; None without values."""
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
    """Return the differences to the reference by seed, for the seeds that have both values."""
    return {
        seed: value - other
        for seed, value in values.items()
        if value is not None and (other := reference.get(seed)) is not None
    }


def trailing_mean(values: Sequence[float], window: int) -> list[float]:
    """Return the mean of each value and those before it, at most ``window`` in total."""
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    # Differences of running sums lose about 1e-16 of a sum. A value that is not finite would stay
    # in all later sums.
    if math.isfinite(sums[-1]):
        return [(sums[i] - sums[max(0, i - window)]) / min(i, window) for i in range(1, len(sums))]
    return [
        math.fsum(part) / len(part)
        for i in range(len(values))
        if (part := values[max(0, i + 1 - window) : i + 1])
    ]


def thinned(count: int, most: int) -> list[int]:
    """Return at most ``most`` of the indices 0 .. count - 1, evenly spaced, with both ends."""
    if count <= most:
        return list(range(count))
    return [round(i * (count - 1) / (most - 1)) for i in range(most)]


def first_crossing(
    tokens: Sequence[int], losses: Sequence[float | None], target: float
) -> float | None:
    """Find where a curve is first at or below ``target``, linear between its points.

    Returns:
        Tokens; those of the first point if it is already below; None if the curve is never below.
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
