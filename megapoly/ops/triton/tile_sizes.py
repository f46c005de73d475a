"""Tiles of a row and warps of a program, from a static table.

There is no autotuning: it would measure in the first step of every rank, differ between ranks and
change the order of sums from run to run.
"""

from __future__ import annotations

from typing import NamedTuple

_WARPS = (1, 2, 4, 8, 16, 32)
MAX_BLOCK = 16384
MAX_BLOCK_OF_LOOP = 2048
_LANES_PER_WARP_OF_LOOP = 256


class Limits(NamedTuple):
    """Limits of a kernel that holds a whole row.

    Args:
        lanes_per_warp: elements of a row that one warp holds.
        max_lanes: elements that a program can hold; longer rows are read twice.
    """

    lanes_per_warp: int
    max_lanes: int


# By the number of fp32 values that a kernel keeps for each element (x in the forward pass, x and g
# in the backward pass, x, g and the gate in the gated one), and by order. Chosen from the
# assembler's report for sm_80 and sm_90 with Triton 3.7
# (`python -m megapoly.ops.triton.ahead_of_time`): no spills, and at most 64 registers at 16 warps,
# so that two programs share a multiprocessor. Backward passes of longer rows take 32 warps and a
# whole multiprocessor.
_LIMITS = {
    (1, 2): Limits(512, 16384),
    (1, 3): Limits(512, 16384),
    (1, 4): Limits(512, 16384),
    (2, 2): Limits(384, 16384),
    (2, 3): Limits(384, 16384),
    (2, 4): Limits(192, 9216),
    (3, 2): Limits(256, 12288),
    (3, 3): Limits(256, 12288),
    (3, 4): Limits(256, 9216),
}


class RowTiles(NamedTuple):
    """Row as ``num_blocks`` blocks of a power of two and one masked tail.

    Args:
        num_blocks: full blocks.
        block: lanes of a block.
        tail: lanes of the tail, a power of two; 0: no tail.
        num_warps: of a program.
    """

    num_blocks: int
    block: int
    tail: int
    num_warps: int


def next_power_of_two(n: int) -> int:
    """Round n > 0 up to a power of two."""
    return 1 << (n - 1).bit_length()


def whole_row_tiles(width: int, *, num_values: int, order: int) -> RowTiles | None:
    """Tile a row that one program holds whole; return None if it is too long.

    Args:
        width: elements of the row.
        num_values: fp32 values that the kernel keeps for each element, 1 to 3.
        order: of the polynomial.
    """
    limits = _LIMITS[num_values, order]
    num_blocks, block, tail = _cut(width, MAX_BLOCK)
    lanes = block + tail  # held at the same time
    if num_blocks > 1 or lanes > limits.max_lanes:
        return None
    return RowTiles(num_blocks, block, tail, _num_warps(lanes, limits.lanes_per_warp))


def blocked_row_tiles(width: int) -> RowTiles:
    """Tile a row for kernels that loop over it in blocks and add lane by lane."""
    num_blocks, block, tail = _cut(width, MAX_BLOCK_OF_LOOP)
    return RowTiles(num_blocks, block, tail, _num_warps(block, _LANES_PER_WARP_OF_LOOP))


def _cut(width: int, max_block: int) -> tuple[int, int, int]:
    """Return blocks, block and tail: 8256 = 8192 + 64 takes half the lanes of 16384."""
    block = min(1 << (width.bit_length() - 1), max_block)
    num_blocks, rest = divmod(width, block)
    return num_blocks, block, next_power_of_two(rest) if rest else 0


def _num_warps(lanes: int, lanes_per_warp: int) -> int:
    """Round down to a power of two: a short tail does not double the warps."""
    return max(n for n in _WARPS if n <= max(1, lanes // lanes_per_warp))
