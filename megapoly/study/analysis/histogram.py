"""A histogram of numbers of unknown range, counted in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

NUM_BINS = 2**14


class GrowingHistogram:
    """Counts in equal bins over [-limit, limit]; the limit doubles if a number is outside.

    Doubling merges pairs of bins, so every count stays exact.
    """

    def __init__(self) -> None:
        self.limit = 0.0
        self.counts = torch.zeros(NUM_BINS, dtype=torch.int64)

    def add(self, values: Tensor) -> None:
        """Count finite numbers of any shape."""
        largest = values.abs().max().item()
        if self.limit == 0.0:
            self.limit = 2.0 ** torch.tensor(max(largest, 1e-30)).log2().ceil().item()
        while largest > self.limit:
            self._double()
        width = 2.0 * self.limit / NUM_BINS
        bins = ((values.flatten() + self.limit) / width).long().clamp_(0, NUM_BINS - 1)
        self.counts += torch.bincount(bins, minlength=NUM_BINS).cpu()

    def _double(self) -> None:
        quarter = NUM_BINS // 4
        merged = self.counts.view(-1, 2).sum(1)
        self.counts = torch.nn.functional.pad(merged, (quarter, quarter))
        self.limit *= 2.0

    @property
    def edges(self) -> Tensor:
        """[bins + 1] fp64."""
        return torch.linspace(-self.limit, self.limit, NUM_BINS + 1, dtype=torch.float64)

    def bins_between(self, low: float, high: float) -> tuple[int, int]:
        """Return the first bin between two quantiles, and the one after the last."""
        share = self.counts.cumsum(0).double() / max(int(self.counts.sum()), 1)
        first = int((share <= low).sum())
        last = int((share < high).sum())
        return min(first, NUM_BINS - 1), min(last, NUM_BINS - 1) + 1
