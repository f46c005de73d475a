from itertools import islice

import pytest

from megapoly.data.order import EpochOrder


def places(order: EpochOrder, start: int, stop: int) -> list[int]:
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
