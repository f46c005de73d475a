"""Sums over the rows of each expert, in a fixed order and without atomics.

The rows of an expert are split into chunks of a fixed size, counted from its first row. One program
adds a chunk, then one program adds the chunks of an expert. The bits depend only on the rows: not
on the device, nor on other experts.
"""

from __future__ import annotations

import triton
import triton.language as tl

CHUNK = 256


@triton.jit
def rows_of_set(offsets_ptr, set_index, num_rows, HAS_EXPERTS: tl.constexpr):
    """Return the first row of a coefficient set, and the one after its last."""
    if HAS_EXPERTS:
        end = tl.load(offsets_ptr + set_index + 1)
        return tl.load(offsets_ptr + set_index), tl.minimum(end, num_rows)
    else:
        return 0, num_rows


@triton.jit(do_not_specialize=["num_rows", "max_chunks"])
def sum_chunks_kernel(
    terms_ptr,
    offsets_ptr,
    chunks_ptr,
    num_rows,
    max_chunks,
    NUM_TERMS: tl.constexpr,
    CHUNK: tl.constexpr,
    HAS_EXPERTS: tl.constexpr,
):
    """Sum [rows, NUM_TERMS] to [sets, max_chunks, NUM_TERMS]; skip chunks beyond a set."""
    set_index = tl.program_id(1)
    chunk = tl.program_id(0)
    begin, end = rows_of_set(offsets_ptr, set_index, num_rows, HAS_EXPERTS)
    first = begin + chunk * CHUNK
    if first < end:
        rows = first.to(tl.int64) + tl.arange(0, CHUNK)
        output = chunks_ptr + (set_index.to(tl.int64) * max_chunks + chunk) * NUM_TERMS
        for k in tl.static_range(NUM_TERMS):
            term = tl.load(terms_ptr + rows * NUM_TERMS + k, mask=rows < end, other=0.0)
            tl.store(output + k, tl.sum(term))


@triton.jit(do_not_specialize=["num_rows", "max_chunks"])
def sum_sets_kernel(
    chunks_ptr,
    offsets_ptr,
    sums_ptr,
    num_rows,
    max_chunks,
    NUM_TERMS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_EXPERTS: tl.constexpr,
):
    """Sum [sets, max_chunks, NUM_TERMS] to [sets, NUM_TERMS]; zeros for a set without rows."""
    set_index = tl.program_id(0)
    begin, end = rows_of_set(offsets_ptr, set_index, num_rows, HAS_EXPERTS)
    num_chunks = (end - begin + CHUNK - 1) // CHUNK
    input_row = chunks_ptr + set_index.to(tl.int64) * max_chunks * NUM_TERMS
    for k in tl.static_range(NUM_TERMS):
        sums = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, num_chunks, BLOCK):
            chunks = start + tl.arange(0, BLOCK)
            sums += tl.load(input_row + chunks * NUM_TERMS + k, mask=chunks < num_chunks, other=0.0)
        tl.store(sums_ptr + set_index * NUM_TERMS + k, tl.sum(sums))
