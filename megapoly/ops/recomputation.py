"""Recomputation of activations without repeating a collective.

The statistics of rows that are split over ranks are r numbers per row. Recomputation keeps them
from the first forward pass, so that PolyNorm is pointwise in the second.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from megapoly.ops.polynorm_registration import polynorm_rsqrt

# Of the region that is running; autograd runs one forward or recomputation at a time.
_kept: list[Tensor] | None = None
_remaining: deque[Tensor] | None = None


def save_row_statistics() -> tuple[Any, Any]:
    """Keep PolyNorm's row statistics; a ``context_fn`` of ``torch.utils.checkpoint.checkpoint``.

        checkpoint(ffn, x, use_reentrant=False, context_fn=save_row_statistics)

    Everything in ``ffn`` is recomputed except the statistics of PolyNorm on rows that are split
    over ranks: r numbers per row are kept, and recomputation does not repeat their all-reduce.
    """
    return create_selective_checkpoint_contexts(_policy)


def _policy(ctx: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    if operator is polynorm_rsqrt:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


@contextmanager
def keeping_row_statistics(kept: list[Tensor]) -> Iterator[None]:
    """Append row statistics to ``kept`` in the first forward pass of a recomputed region.

    For checkpointing that runs a function twice without a ``context_fn``, as the engine does. Not
    for layers under ``torch.compile``: they would compile again for every number of kept tensors.
    """
    with _region(kept, None):
        yield


@contextmanager
def reusing_row_statistics(kept: list[Tensor]) -> Iterator[None]:
    """Take row statistics from ``kept`` in the recomputation, in the order of the first pass."""
    with _region(None, deque(kept)):
        yield


@contextmanager
def _region(kept: list[Tensor] | None, remaining: deque[Tensor] | None) -> Iterator[None]:
    global _kept, _remaining
    before = _kept, _remaining
    _kept, _remaining = kept, remaining
    try:
        yield
    finally:
        _kept, _remaining = before


def row_statistics(compute: Callable[[], Tensor]) -> Tensor:
    """Return the result of ``compute``, or the one kept from the first forward pass."""
    if _remaining is not None:
        if not _remaining:
            raise RuntimeError("The recomputation has more PolyNorms than its first forward pass.")
        return _remaining.popleft()
    statistics = compute()
    if _kept is not None:
        _kept.append(statistics)
    return statistics
