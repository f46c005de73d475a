"""The order in which samples are visited: of one source, and of a blend of several."""

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
        """Return what a dataset knows the sample at place ``index`` by."""


class EpochOrder:
    """A new permutation of the samples in every epoch.

        sample i  ->  permutation(seed, i // N)[i % N]

    It depends on nothing else: not on the length of training, the batch size or the layout.
    ``numpy.random.RandomState`` is used because numpy guarantees its stream for ever; a run resumed
    under another numpy goes on in the same order.

    Args:
        num_samples: N, samples in one epoch.
        seed: in [0, 2**32).
        source: number of the source in a blend; every source has permutations of its own.
    """

    def __init__(self, num_samples: int, seed: int, source: int = 0):
        assert num_samples > 0
        self.num_samples = num_samples
        self.seed = seed
        self._source = source
        self._permutations: dict[int, np.ndarray] = {}

    def __getitem__(self, index: int) -> int:
        """Return which of the N samples stands at place ``index`` of the endless sequence."""
        epoch, place = divmod(index, self.num_samples)
        return int(self._permutation(epoch)[place])

    def _permutation(self, epoch: int) -> np.ndarray:
        if epoch not in self._permutations:
            # A batch may lie across the border of two epochs: keep the one before.
            self._permutations = {e: p for e, p in self._permutations.items() if e == epoch - 1}
            # The first source has no third word, and words of a block (below) end in 0: no two
            # streams are the same.
            words = [self.seed, epoch, *([self._source] if self._source else [])]
            permutation = np.random.RandomState(words).permutation(self.num_samples)
            narrow = self.num_samples <= np.iinfo(np.uint32).max
            self._permutations[epoch] = permutation.astype(np.uint32 if narrow else np.int64)
        return self._permutations[epoch]


class BlendOrder:
    """Samples of several sources in fixed shares, each source in its own :class:`EpochOrder`.

    Samples come in blocks of B, the larger of 1024 and the least power of two with B p_i >= 1 for
    every share p_i. With the exact cumulative shares P_i = p_0 + .. + p_(i-1),

        b_i(k) = floor(k B P_i + 1/2),   C_i(k) = b_(i+1)(k) - b_i(k)

    source i has C_i(k) of the first k B samples, within one of its exact share of them, however
    long the run is. In block k are C_i(k + 1) - C_i(k) samples of it, in an order of
    ``RandomState([seed, k, 0])``; the u-th sample of source i in the whole sequence is place u of
    its own order. As there, nothing depends on the length of training, the batch size or the
    layout, and no place depends on what was read before.

    Args:
        num_samples: samples in one epoch of each source.
        shares: of each source; they add up to 1.
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
        """Return the source, and which of its samples, at place ``index``."""
        block, place = divmod(index, self.block_size)
        sources, uses = self._block(block)
        source = int(sources[place])
        return source, self._orders[source][int(uses[place])]

    def counts(self, block: int) -> np.ndarray:
        """C_i: how many of the samples before a block come from each source."""
        first = block * self.block_size
        bounds = [floor(first * share + Fraction(1, 2)) for share in self._cumulative]
        return np.diff(np.array(bounds, np.int64))

    def _block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Source of every sample of a block, and its place in the order of that source."""
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
            # Sorted by source with places kept in order, the n-th of a source is its n-th use.
            ordered = np.empty_like(uses)
            ordered[np.argsort(shuffled, kind="stable")] = uses
            self._blocks[block] = shuffled, ordered
        return self._blocks[block]


def _ceil(number: Fraction) -> int:
    return -(-number.numerator // number.denominator)
