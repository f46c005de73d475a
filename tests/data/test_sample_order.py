from fractions import Fraction
from itertools import islice

import numpy as np
import pytest

from megapoly.data.sample_order import BlendOrder, EpochOrder


def places(order, start: int, stop: int) -> list:
    return [order[place] for place in range(start, stop)]


def test_every_epoch_is_another_permutation():
    order = EpochOrder(50, seed=3)
    epochs = [places(order, 50 * e, 50 * (e + 1)) for e in range(4)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert places(EpochOrder(50, seed=4), 0, 50) != epochs[0]


@pytest.mark.parametrize("start", [0, 1, 49, 50, 51, 130])
def test_a_place_does_not_depend_on_what_was_read_before(start):
    whole = places(EpochOrder(50, seed=3), 0, 200)
    assert places(EpochOrder(50, seed=3), start, 200) == whole[start:]
    backwards = EpochOrder(50, seed=3)
    assert [backwards[place] for place in reversed(range(200))] == whole[::-1]


def test_the_order_is_that_of_every_release():
    # Changed values mean that runs cannot be resumed in the order in which they began.
    assert places(EpochOrder(10, seed=1234), 0, 20) == PINNED


def test_only_two_permutations_are_kept():
    order = EpochOrder(5, seed=0)
    for place in islice(range(0, 1000, 3), 300):
        order[place]
        assert len(order._permutations) <= 2


PINNED = [3, 8, 6, 4, 9, 1, 5, 2, 0, 7, 3, 9, 7, 6, 4, 1, 8, 2, 5, 0]


# Shares in awkward proportions, and the size of a block that each needs.
THIRDS = [Fraction(1, 3)] * 3, 1024
SEVENTHS = [Fraction(1, 7), Fraction(2, 7), Fraction(4, 7)], 1024
TINY = [Fraction(1, 5000), Fraction(9, 5000), Fraction(499, 500)], 8192
PRIMES = [Fraction(n, 10007) for n in (7001, 2003, 1003)], 1024
MANY = [Fraction(n, 1275) for n in range(1, 51)], 2048
BLENDS = {"thirds": THIRDS, "sevenths": SEVENTHS, "tiny": TINY, "primes": PRIMES, "many": MANY}


def blend(shares, *, seed: int = 3, size: int = 5) -> BlendOrder:
    return BlendOrder([size + i for i in range(len(shares))], shares, seed)


@pytest.mark.parametrize(("shares", "block_size"), BLENDS.values(), ids=BLENDS)
def test_after_every_block_each_source_is_within_one_of_its_exact_share(shares, block_size):
    order = blend(shares)
    assert order.block_size == block_size
    seen = np.zeros(len(shares), np.int64)
    for block in range(8):
        sources = [order[block * block_size + place][0] for place in range(block_size)]
        counts = np.bincount(sources, minlength=len(shares))
        seen += counts
        exact = [share * (block + 1) * block_size for share in shares]
        assert max(abs(int(n) - e) for n, e in zip(seen, exact, strict=True)) < 1
    # Also far into the run, without reading what is before it: 10**9 blocks.
    far = order.counts(10**9)
    exact = [share * 10**9 * block_size for share in shares]
    assert max(abs(int(n) - e) for n, e in zip(far, exact, strict=True)) < 1


def test_every_source_of_a_blend_goes_through_its_own_epochs():
    order = BlendOrder([50, 50, 11], SEVENTHS[0], seed=3)
    visited = places(order, 0, 5000)
    for source, size in enumerate([50, 50, 11]):
        samples = [sample for i, sample in visited if i == source]
        assert samples == places(EpochOrder(size, 3, source), 0, len(samples))
        assert sorted(samples[:size]) == sorted(samples[size : 2 * size]) == list(range(size))
    first, second = (places(EpochOrder(50, 3, source), 0, 50) for source in (0, 1))
    assert first != second


def test_sources_are_mixed_within_a_block_differently_in_each():
    order = blend(THIRDS[0])
    blocks = [[order[1024 * k + i][0] for i in range(1024)] for k in range(3)]
    for block in blocks:
        # Every stretch of 64 has all three: runs of one source would not.
        assert all(len(set(block[i : i + 64])) == 3 for i in range(0, 1024, 64))
    assert blocks[0] != blocks[1] != blocks[2]
    assert [blend(THIRDS[0], seed=4)[i][0] for i in range(1024)] != blocks[0]


@pytest.mark.parametrize("start", [0, 1, 1023, 1024, 1025, 3000])
def test_a_place_of_a_blend_does_not_depend_on_what_was_read_before(start):
    whole = places(blend(SEVENTHS[0]), 0, 4000)
    assert places(blend(SEVENTHS[0]), start, 4000) == whole[start:]
    backwards = blend(SEVENTHS[0])
    assert [backwards[place] for place in reversed(range(4000))] == whole[::-1]
    anywhere = blend(SEVENTHS[0])
    jumps = np.random.RandomState(start).permutation(4000)[:300]
    assert [anywhere[int(place)] for place in jumps] == [whole[place] for place in jumps]


def test_a_blend_of_one_is_the_order_of_its_source():
    alone = BlendOrder([50], [Fraction(1)], seed=3)
    assert places(alone, 0, 3000) == [(0, i) for i in places(EpochOrder(50, seed=3), 0, 3000)]


def test_the_mix_is_that_of_every_release():
    shares = [Fraction(1, 2), Fraction(1, 4), Fraction(1, 4)]
    order = BlendOrder([10, 3, 4], shares, seed=1234)
    assert places(order, 0, 12) == PINNED_BLEND


# By hand from the formulas: 512, 256 and 256 sources in the order of RandomState([1234, 0, 0]).
PINNED_BLEND = [
    (2, 2),
    (1, 0),
    (0, 3),
    (0, 8),
    (2, 3),
    (0, 6),
    (2, 1),
    (1, 1),
    (0, 4),
    (0, 9),
    (0, 1),
    (1, 2),
]
