"""Exact statistics of document lengths in constant memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import numpy as np

from megapoly.errors import DataError

PERCENTILES = (1, 10, 25, 50, 75, 90, 99)
# One count for each smaller length: 8 MiB. A longer document has over a million tokens, so even a
# terabyte has few of them.
_COUNTED_BY_ARRAY = 1 << 20


class LengthStatistics:
    """Number of documents of each length, and statistics of these.

    Memory does not grow with the number of documents.

    Args:
        chunks: lengths of documents, see :meth:`add`.
    """

    def __init__(self, chunks: Iterable[np.ndarray] = ()) -> None:
        self.count = 0
        self.sum = 0
        self._short = np.zeros(_COUNTED_BY_ARRAY, np.int64)
        self._long: Counter[int] = Counter()
        for chunk in chunks:
            self.add(chunk)

    def add(self, lengths: np.ndarray) -> None:
        """Count documents.

        Args:
            lengths: [documents] integers, in tokens.

        Raises:
            DataError: a length is negative.
        """
        if len(lengths) == 0:
            return
        if lengths.min() < 0:
            raise DataError(
                f"A document's length must not be negative; one is {lengths.min()}. The index is "
                "damaged: copy or create the token files again."
            )
        self.count += len(lengths)
        self.sum += int(lengths.sum(dtype=np.int64))
        is_short = lengths < len(self._short)
        np.add.at(self._short, lengths[is_short], 1)
        self._long.update(lengths[~is_short].tolist())

    def by_length(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the lengths that occur, ascending, and the number of documents of each; int64."""
        lengths = np.flatnonzero(self._short)
        beyond = np.array(sorted(self._long), np.int64)
        counts_beyond = np.array([self._long[length] for length in beyond.tolist()], np.int64)
        counts = self._short[lengths]
        return np.concatenate([lengths, beyond]), np.concatenate([counts, counts_beyond])

    @property
    def mean(self) -> float:
        """Mean length; 0 if there are no documents."""
        return self.sum / self.count if self.count else 0.0

    def quantiles(self) -> dict[str, float]:
        """Return the content of ``PairRecord.tokens_per_document``.

        Returns:
            ``min``, ``p01``, ``p10``, ``p25``, ``p50``, ``p75``, ``p90``, ``p99``, ``max`` and
            ``mean``. The quantile q of n documents is the length at index floor(q (n - 1)) of the
            sorted lengths. All are 0 if there are no documents.
        """
        last = max(self.count - 1, 0)
        # In integers: 0.29 * 100 is below 29 in floating point.
        ranks = {f"p{percent:02}": percent * last // 100 for percent in PERCENTILES}
        ranks = {"min": 0, **ranks, "max": last}
        values = {name: float(self._at_rank(rank)) for name, rank in ranks.items()}
        return {**values, "mean": self.mean}

    def _at_rank(self, rank: int) -> int:
        """Return the length at an index of the sorted lengths."""
        if self.count == 0:
            return 0
        lengths, counts = self.by_length()
        return int(lengths[np.searchsorted(np.cumsum(counts), rank, side="right")])
