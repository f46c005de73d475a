"""The CRC-32 of joined bytes is zlib's of the whole."""

import random
import zlib

from megapoly.checkpoints.crc32 import joined


def test_the_crc_of_two_parts_is_that_of_the_whole() -> None:
    rng = random.Random(1)
    for _ in range(200):
        first, second = rng.randbytes(rng.randrange(50)), rng.randbytes(rng.randrange(5000))
        assert joined(zlib.crc32(first), zlib.crc32(second), len(second)) == zlib.crc32(
            first + second
        )


def test_parts_can_be_longer_than_a_crc_can_count() -> None:
    """2^33 zeros: joined from 2^13 pieces, and at once by repeated doubling."""
    piece = zlib.crc32(bytes(1 << 20))
    one_by_one = doubled = piece
    for _ in range((1 << 13) - 1):
        one_by_one = joined(one_by_one, piece, 1 << 20)
    for power in range(20, 33):
        doubled = joined(doubled, doubled, 1 << power)
    assert one_by_one == doubled
