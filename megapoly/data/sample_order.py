"""The order in which samples are read: from one source, and from a blend of several."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from math import floor
from typing import Any, Protocol

import numpy as np

_SMALLEST_BLOCK = 1024


class Order(Protocol):
    """An endless sequence of samples."""

    def __getitem__(self, index: int) -> Any:
        """Return the dataset's key of the sample at position ``index``."""


class EpochOrder:
    """A new permutation of the samples in every epoch.

        sample i  ->  permutation(seed, i // N)[i % N]

    It depends on nothing else: not on the length of training, the batch size or the layout.
    ``numpy.random.RandomState`` is used because numpy guarantees its stream across versions, so a
    run resumed with another numpy continues in the same order.

    Args:
        num_samples: N, samples in one epoch.
        seed: in [0, 2**32).
        source: index of the source in a blend; every source has its own permutations.
    """

    def __init__(self, num_samples: int, seed: int, source: int = 0):
        assert num_samples > 0
        self.num_samples = num_samples
        self.seed = seed
        self._source = source
        self._permutations: dict[int, np.ndarray] = {}

    def __getitem__(self, index: int) -> int:
        """Return which of the N samples is at position ``index`` of the endless sequence."""
        epoch, position = divmod(index, self.num_samples)
        return int(self._permutation(epoch)[position])

    def _permutation(self, epoch: int) -> np.ndarray:
        if epoch not in self._permutations:
            # A batch may cross the boundary of two epochs: keep the previous one.
            self._permutations = {e: p for e, p in self._permutations.items() if e == epoch - 1}
            # The seed of the first source has two numbers, and the seed of a block (below) ends in
            # 0: no two streams are the same.
            seed = [self.seed, epoch, *([self._source] if self._source else [])]
            permutation = np.random.RandomState(seed).permutation(self.num_samples)
            narrow = self.num_samples <= np.iinfo(np.uint32).max
            self._permutations[epoch] = permutation.astype(np.uint32 if narrow else np.int64)
        return self._permutations[epoch]


class BlendOrder:
    """Samples of several sources in fixed shares, each source in its own :class:`EpochOrder`.

    Samples come in blocks of B, the larger of 1024 and the smallest power of two with B p_i >= 1
    for every share p_i. With the exact cumulative shares P_i = p_0 + .. + p_(i-1),

        b_i(k) = floor(k B P_i + 1/2),   C_i(k) = b_(i+1)(k) - b_i(k)

    source i has C_i(k) of the first k B samples, within one of its exact share of them, however
    long the run is. Block k has C_i(k + 1) - C_i(k) samples of it, in an order drawn from
    ``RandomState([seed, k, 0])``; the u-th sample of source i in the whole sequence is at position
    u of its own order. As in :class:`EpochOrder`, nothing depends on the length of training, the
    batch size or the layout, and no position depends on what was read before.

    Args:
        num_samples: samples in one epoch of each source.
        shares: share of each source; they sum to 1.
        seed: in [0, 2**32).
    """

    def __init__(self, num_samples: Sequence[int], shares: Sequence[Fraction], seed: int):
        assert sum(shares) == 1 and min(shares) > 0
        self.seed = seed
        self.block_size = max(_SMALLEST_BLOCK, 1 << (_ceil(1 / min(shares)) - 1).bit_length())
        self._orders = [EpochOrder(size, seed, i) for i, size in enumerate(num_samples)]
        self._cumulative = [sum(shares[:i], Fraction(0)) for i in range(len(shares) + 1)]
        self._blocks: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def __getitem__(self, index: int) -> tuple[int, int]:
        """Return the source at position ``index``, and which of its samples."""
        block, position = divmod(index, self.block_size)
        sources, uses = self._block(block)
        source = int(sources[position])
        return source, self._orders[source][int(uses[position])]

    def counts(self, block: int) -> np.ndarray:
        """Return C_i, how many of the samples before a block come from each source."""
        first = block * self.block_size
        bounds = [floor(first * share + Fraction(1, 2)) for share in self._cumulative]
        return np.diff(np.array(bounds, np.int64))

    def _block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the source of every sample of a block, and its position in that source's order."""
        if block not in self._blocks:
            self._blocks = {k: made for k, made in self._blocks.items() if k == block - 1}
            before = self.counts(block)
            counts = self.counts(block + 1) - before
            sources = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
            uses = np.repeat(before - (np.cumsum(counts) - counts), counts) + np.arange(
                len(sources)
            )
            random = np.random.RandomState([self.seed, block, 0])
            shuffled = random.permutation(sources)
            # In a stable sort by source, the n-th entry of a source is its n-th use.
            ordered = np.empty_like(uses)
            ordered[np.argsort(shuffled, kind="stable")] = uses
            self._blocks[block] = shuffled, ordered
        return self._blocks[block]


def _ceil(number: Fraction) -> int:
    return -(-number.numerator // number.denominator)
