"""Exchanges between the ranks that share a sequence.

Of 2 cp equal pieces of a sequence, context-parallel rank r holds piece r and piece 2 cp - 1 - r, in
this order (megatron/core/utils.py:1994): an early and a late one, so that every rank has
the same work in causal attention.
"""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel.mappings import (
    all_to_all,
    gather_from_sequence_parallel_region,
)
from torch import Tensor
from torch.distributed import ProcessGroup


def pieces_of_rank(group: ProcessGroup) -> tuple[int, int]:
    """Return the indices of the pieces of a sequence that this rank holds."""
    return group.rank(), 2 * group.size() - 1 - group.rank()


def gather_sequence(x: Tensor, group: ProcessGroup) -> Tensor:
    """Gather whole sequences on every rank: [s / cp, ...] -> [s, ...], in the order of the text.

    The gradient is summed over the ranks, and each rank gets the gradient of its own pieces.
    """
    return _in_text_order(gather_from_sequence_parallel_region(x, group=group), group)


def heads_for_sequence(x: Tensor, group: ProcessGroup) -> Tensor:
    """Get some heads of whole sequences: [s / cp, b, heads, d] -> [s, b, heads / cp, d]."""
    size = group.size()
    by_rank = (
        x.unflatten(2, (size, -1)).movedim(2, 0).contiguous()
    )  # [cp, s / cp, b, heads / cp, d]
    return _in_text_order(all_to_all(group, by_rank).flatten(0, 1), group)


def sequence_for_heads(x: Tensor, group: ProcessGroup) -> Tensor:
    """Get all heads of this rank's pieces: [s, b, heads / cp, d] -> [s / cp, b, heads, d]."""
    by_rank = _in_rank_order(x, group).unflatten(0, (group.size(), -1)).contiguous()
    return all_to_all(group, by_rank).movedim(0, 2).flatten(2, 3)


def _rank_order(group: ProcessGroup) -> list[int]:
    """Return the order of the pieces when the ranks' parts are concatenated."""
    last = 2 * group.size() - 1
    return [piece for rank in range(group.size()) for piece in (rank, last - rank)]


def _in_rank_order(x: Tensor, group: ProcessGroup) -> Tensor:
    return _permuted(x, _rank_order(group))


def _in_text_order(x: Tensor, group: ProcessGroup) -> Tensor:
    order = _rank_order(group)
    return _permuted(x, [order.index(piece) for piece in range(len(order))])


def _permuted(x: Tensor, order: list[int]) -> Tensor:
    pieces = x.chunk(len(order))
    return torch.cat([pieces[i] for i in order])
