"""Loads and stores of tiles, and the coefficient set of a row."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def set_of_row(expert_ptr, row, num_experts, HAS_EXPERTS: tl.constexpr):
    """Return the coefficient set of a row, and whether it is a row and not padding."""
    if HAS_EXPERTS:
        expert = tl.load(expert_ptr + row)
        return tl.minimum(expert, num_experts - 1), expert < num_experts
    else:
        return 0, True


@triton.jit
def aligned(elements, ALIGN: tl.constexpr):
    """Mark a number as a multiple of ``ALIGN``, which allows loads of 16 bytes."""
    return elements // ALIGN * ALIGN


@triton.jit
def load_block(pointer, columns, is_row, HAS_EXPERTS: tl.constexpr):
    """Load a full block as fp32, since bf16 sums would lose bits; zeros for padding."""
    if HAS_EXPERTS:
        return tl.load(pointer + columns, mask=is_row & (columns >= 0), other=0.0).to(tl.float32)
    else:
        return tl.load(pointer + columns).to(tl.float32)


@triton.jit
def load_tail(pointer, columns, width, is_row, HAS_EXPERTS: tl.constexpr):
    """Load the tail as fp32; zeros beyond the row and for padding."""
    mask = columns < width
    if HAS_EXPERTS:
        mask = mask & is_row
    return tl.load(pointer + columns, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_block(pointer, columns, value):
    """Store a full block in the dtype of the memory."""
    tl.store(pointer + columns, value.to(pointer.dtype.element_ty))


@triton.jit
def store_tail(pointer, columns, width, value):
    """Store the tail in the dtype of the memory."""
    tl.store(pointer + columns, value.to(pointer.dtype.element_ty), mask=columns < width)


@triton.jit
def load_of_row(pointer, is_row, other, HAS_EXPERTS: tl.constexpr):
    """Load one number as fp32; ``other`` for padding."""
    if HAS_EXPERTS:
        return tl.load(pointer, mask=is_row, other=other).to(tl.float32)
    else:
        return tl.load(pointer).to(tl.float32)


@triton.jit
def load_prob(probs_ptr, row, is_row, HAS_PROBS: tl.constexpr, HAS_EXPERTS: tl.constexpr):
    """Load the router probability of a row: 1 without probabilities, 0 for padding."""
    if HAS_PROBS:
        return load_of_row(probs_ptr + row, is_row, 0.0, HAS_EXPERTS)
    elif HAS_EXPERTS:
        return tl.where(is_row, 1.0, 0.0)
    else:
        return 1.0
