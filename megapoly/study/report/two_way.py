"""A two-way model of a table of results, and simultaneous intervals of its differences.

    y_ij = m + line_i + seed_j + e_ij,   e_ij independent, normal, of one variance

Every line has every seed, so that a difference of two lines is that of their means.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95


@dataclass(frozen=True)
class TwoWayFit:
    """Least-squares fit of the model.

    Args:
        means: of each line over the seeds.
        deviation: standard deviation of e, pooled over all lines; (k - 1) (n - 1) degrees of
            freedom.
        degrees: of freedom.
        correlation: intraclass correlation of the runs of one seed,
            (S - E) / (S + (k - 1) E) with the mean squares S of seeds and E of e (Shrout and Fleiss
            1979, ICC(3, 1)). Zero or less: runs of one seed are no more alike than others. None if
            no two results differ beyond their lines.
        half_interval: half of the simultaneous 95 % interval of every difference of two lines,
            q(k, (k - 1) (n - 1)) deviation / sqrt(n), with the studentized range q (Tukey).
    """

    means: list[float]
    deviation: float
    degrees: int
    correlation: float | None
    half_interval: float


def fit(results: Sequence[Sequence[float]]) -> TwoWayFit:
    """Fit the model.

    Args:
        results: [k lines, n seeds], finite; k and n are at least 2.

    Returns:
        With two lines the interval is that of Student's t for paired differences.
    """
    y = np.asarray(results, dtype=np.float64)
    num_lines, num_seeds = y.shape
    of_lines, of_seeds, middle = y.mean(1, keepdims=True), y.mean(0, keepdims=True), y.mean()
    degrees = (num_lines - 1) * (num_seeds - 1)
    noise = float(((y - of_lines - of_seeds + middle) ** 2).sum()) / degrees
    seeds = num_lines * float(((of_seeds - middle) ** 2).sum()) / (num_seeds - 1)
    total = seeds + (num_lines - 1) * noise
    return TwoWayFit(
        means=of_lines[:, 0].tolist(),
        deviation=math.sqrt(noise),
        degrees=degrees,
        correlation=(seeds - noise) / total if total > 0 else None,
        half_interval=_studentized_range(num_lines, degrees) * math.sqrt(noise / num_seeds),
    )


@functools.cache
def _studentized_range(num_lines: int, degrees: int) -> float:
    """Return the 95 % quantile of the studentized range."""
    # Imported here: it takes half a second, and a comparison starts without it.
    from scipy.stats import studentized_range

    return float(studentized_range.ppf(CONFIDENCE, num_lines, degrees))
