"""Saturation and outliers of numbers in rows, one row for each token."""

from __future__ import annotations

import torch
from torch import Tensor

# Relative to a row's root mean square: below the first a number has almost no effect on the output
# of the next matrix; above the second it is an outlier.
NEAR_ZERO, OUTLIER = 0.01, 6.0


class RowStatistics:
    """Statistics over all numbers of all rows; R is the root mean square of a number's own row."""

    def __init__(self) -> None:
        self._count = 0
        self._num_rows = 0
        self._powers = torch.zeros(4, dtype=torch.float64)
        self._zeros = self._near_zero = self._outliers = 0
        self._peaks = 0.0
        self._largest_peak = 0.0

    def add(self, rows: Tensor) -> None:
        """Count rows [n, d], fp32 or fp64."""
        wide = rows.double()
        self._count += rows.numel()
        self._num_rows += len(rows)
        squares = wide.square()
        sums = [wide.sum(), squares.sum(), (wide * squares).sum(), squares.square().sum()]
        self._powers += torch.stack(sums).cpu()
        size, mean_square = wide.abs(), squares.mean(-1, keepdim=True)
        root = mean_square.sqrt()
        self._zeros += int((rows == 0).sum())
        self._near_zero += int((size <= NEAR_ZERO * root).sum())
        self._outliers += int((size > OUTLIER * root).sum())
        peaks = size.amax(-1) / root.squeeze(-1).clamp_min(1e-300)
        self._peaks += peaks.sum().item()
        self._largest_peak = max(self._largest_peak, peaks.max().item())

    def result(self) -> dict[str, float]:
        """Return all statistics, by name.

        Returns:
            ``mean``; ``rms``, the root mean square of all numbers; ``kurtosis``, E (v - mean)^4 /
            (E (v - mean)^2)^2, 3 for a normal distribution and 0 if all are equal; shares of
            numbers ``zero`` (exactly), ``near_zero`` (|v| <= 0.01 R) and ``outliers`` (|v| > 6 R);
            ``max_over_rms``, the mean over rows of max |v| / R, and ``largest_max_over_rms``.
        """
        m1, m2, m3, m4 = (self._powers / self._count).tolist()
        variance = m2 - m1**2
        fourth = m4 - 4 * m1 * m3 + 6 * m1**2 * m2 - 3 * m1**4
        return {
            "mean": m1,
            "rms": m2**0.5,
            "kurtosis": fourth / variance**2 if variance > 1e-12 * m2 else 0.0,
            "zero": self._zeros / self._count,
            "near_zero": self._near_zero / self._count,
            "outliers": self._outliers / self._count,
            "max_over_rms": self._peaks / self._num_rows,
            "largest_max_over_rms": self._largest_peak,
        }
