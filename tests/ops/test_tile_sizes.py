"""How rows are cut into tiles."""

from __future__ import annotations

import itertools

import pytest

from megapoly.ops.triton.tile_sizes import (
    RowTiles,
    blocked_row_tiles,
    next_power_of_two,
    whole_row_tiles,
)
from megapoly.polynomial import ORDERS

KEPT_VALUES = (1, 2, 3)
FORWARD = {"num_values": 1, "order": 3}


def lanes(tiles: RowTiles) -> int:
    return tiles.num_blocks * tiles.block + tiles.tail


@pytest.mark.parametrize(
    ("width", "block", "tail"),
    [
        (1, 1, 0),
        (3, 2, 1),
        (129, 128, 1),
        (1536, 1024, 512),
        (8256, 8192, 64),
        (11008, 8192, 4096),
        (16384, 16384, 0),
    ],
)
def test_whole_row_is_a_block_and_a_tail(width, block, tail):
    assert whole_row_tiles(width, **FORWARD)[:3] == (1, block, tail)


@pytest.mark.parametrize(
    ("width", "num_blocks", "block", "tail"),
    [
        (1, 1, 1, 0),
        (1032, 1, 1024, 8),
        (8256, 4, 2048, 64),
        (11008, 5, 2048, 1024),
        (100_000, 48, 2048, 2048),
    ],
)
def test_row_in_blocks_and_a_tail(width, num_blocks, block, tail):
    assert blocked_row_tiles(width)[:3] == (num_blocks, block, tail)


@pytest.mark.parametrize(
    ("width", "num_warps"), [(1, 1), (1032, 2), (1536, 2), (8256, 16), (11008, 16), (16384, 32)]
)
def test_warps_of_a_whole_row(width, num_warps):
    assert whole_row_tiles(width, **FORWARD).num_warps == num_warps


@pytest.mark.parametrize("width", [2048, 8256, 11008, 100_000])
def test_warps_of_a_row_in_blocks_are_those_of_a_block(width):
    assert blocked_row_tiles(width).num_warps == 8


def test_tiles_cover_every_width_with_at_most_half_of_it_too_much():
    for width in range(1, 20_000):
        for tiles in (blocked_row_tiles(width), whole_row_tiles(width, **FORWARD)):
            if tiles is not None:
                assert width <= lanes(tiles) < 1.5 * width
                assert tiles.num_blocks * tiles.block <= width


def test_blocks_and_tails_are_powers_of_two():
    for width in range(1, 20_000, 7):
        tiles = blocked_row_tiles(width)
        for size in (tiles.block, tiles.tail, tiles.num_warps):
            assert size & (size - 1) == 0


def test_power_of_two_has_no_tail():
    for exponent in range(15):
        assert blocked_row_tiles(1 << exponent).tail == 0
        assert whole_row_tiles(1 << exponent, **FORWARD).tail == 0


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("num_values", KEPT_VALUES)
def test_every_kernel_holds_the_papers_row_and_refuses_a_longer_one_than_it_can(num_values, order):
    """8256: the FFN width of the paper's dense model."""
    tiles = [whole_row_tiles(n, num_values=num_values, order=order) for n in range(1, 20_000)]
    longest = sum(tile is not None for tile in tiles)
    assert 8256 <= longest <= 16384
    assert None not in tiles[:longest] and set(tiles[longest:]) == {None}


def test_no_more_values_or_higher_order_hold_a_longer_row():
    def longest(num_values: int, order: int) -> int:
        return max(
            n
            for n in range(1, 20_000, 64)
            if whole_row_tiles(n, num_values=num_values, order=order)
        )

    for num_values, order in itertools.product(KEPT_VALUES, ORDERS):
        if num_values > 1:
            assert longest(num_values, order) <= longest(num_values - 1, order)
        if order > 2:
            assert longest(num_values, order) <= longest(num_values, order - 1)


def test_next_power_of_two():
    assert [next_power_of_two(n) for n in (1, 2, 3, 64, 65)] == [1, 2, 4, 64, 128]
