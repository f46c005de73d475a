"""Helpers of the functions that launch kernels."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from megapoly.ops.arguments import expert_of_row
from megapoly.ops.triton.kernels.row_sums import CHUNK, sum_chunks_kernel, sum_sets_kernel
from megapoly.ops.triton.tile_sizes import RowTiles, blocked_row_tiles

P = ParamSpec("P")
R = TypeVar("R")

# Chunks that a program of the second stage adds at a time.
_CHUNKS = 128


def on_device_of_rows(function: Callable[P, R]) -> Callable[P, R]:
    """Launch on the device of the first argument; Triton would use the current one."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        rows: Any = args[0]
        if rows.device.type != "cuda":
            return function(*args, **kwargs)
        with torch.cuda.device(rows.device):
            return function(*args, **kwargs)

    return run


def experts_of(offsets: Tensor | None, num_rows: int) -> Tensor | None:
    """Return the expert of each row, [rows] int32: one small kernel, 4 bytes per row to read."""
    return None if offsets is None else expert_of_row(offsets, num_rows)


def contiguous(tensor: Tensor | None) -> Tensor | None:
    """Make an optional argument contiguous."""
    return None if tensor is None else tensor.contiguous()


def row_stride(x: Tensor | None) -> int:
    """Return the number of elements from one row to the next."""
    return 0 if x is None else x.stride(0)


def alignment(*elements: int) -> int:
    """Return the largest power of two up to 16 that divides widths and strides.

    Triton itself only checks divisibility by 16. At tensor parallel 8 the paper's width 8256 leaves
    1032 = 8 * 129: rows begin at multiples of 16 bytes in bf16, but Triton reads 2 bytes at a time.
    """
    return math.gcd(16, *elements)


def whole_row_options(tiles: RowTiles) -> dict[str, int]:
    """Return launch options of a kernel that holds a whole row."""
    return {"BLOCK": tiles.block, "TAIL": tiles.tail, "num_warps": tiles.num_warps}


def blocked_row_options(width: int) -> dict[str, int]:
    """Return launch options of a kernel that loops over a row in blocks."""
    tiles = blocked_row_tiles(width)
    return {"NUM_BLOCKS": tiles.num_blocks, **whole_row_options(tiles)}


def gradient_of_sets(terms: Tensor, parameter: Tensor, offsets: Tensor | None) -> Tensor:
    """Sum [rows, n] terms to the gradient of a parameter, [n] or [experts, n]."""
    num_sets = 1 if offsets is None else parameter.shape[0]
    return sum_over_rows(terms, offsets, num_sets).view(parameter.shape).to(parameter.dtype)


def sum_over_rows(terms: Tensor, offsets: Tensor | None, num_sets: int) -> Tensor:
    """Sum each expert's rows.

    Args:
        terms: [rows, n] fp32, contiguous.
        offsets: [experts + 1] int32, or None: all rows are one set.
        num_sets: experts; 1 without offsets.

    Returns:
        [num_sets, n] fp32.
    """
    num_rows, num_terms = terms.shape
    # The sizes of experts are on the device, and any of them may hold all rows.
    max_chunks = max(1, -(-num_rows // CHUNK))
    chunks = terms.new_empty(num_sets, max_chunks, num_terms)
    sums = terms.new_empty(num_sets, num_terms)
    has_experts = offsets is not None
    sum_chunks_kernel[(max_chunks, num_sets)](
        terms, offsets, chunks, num_rows, max_chunks, num_terms, CHUNK, has_experts, num_warps=4
    )
    sum_sets_kernel[(num_sets,)](
        chunks,
        offsets,
        sums,
        num_rows,
        max_chunks,
        num_terms,
        CHUNK,
        _CHUNKS,
        has_experts,
        num_warps=4,
    )
    return sums
