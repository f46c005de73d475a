"""Recomputing activations without repeating a collective.

The statistics of rows that are cut over ranks are r numbers a row. What recomputes activations
keeps them from the first forward pass, so that the second is pointwise where PolyNorm is concerned.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from megapoly.ops.polynorm_registration import polynorm_rsqrt

# Of the region that runs just now; autograd runs one forward or recomputation at a time.
_kept: list[Tensor] | None = None
_remaining: deque[Tensor] | None = None


def save_row_statistics() -> tuple[Any, Any]:
    """``context_fn`` of ``torch.utils.checkpoint.checkpoint``: keep the rows' reciprocal roots.

        checkpoint(ffn, x, use_reentrant=False, context_fn=save_row_statistics)

    Everything in ``ffn`` is recomputed but the statistics of PolyNorm on rows that are cut over
    ranks: r numbers a row are kept, and recomputation has no all-reduce of theirs.
    """
    return create_selective_checkpoint_contexts(_policy)


def _policy(ctx: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    if operator is polynorm_rsqrt:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


@contextmanager
def keeping_row_statistics(kept: list[Tensor]) -> Iterator[None]:
    """First forward pass of a region whose activations are recomputed: fill ``kept``.

    For checkpointing that runs a function twice without a ``context_fn``, like the engine's. Not
    for layers under ``torch.compile``: it would compile again for every number of kept tensors.
    """
    with _region(kept, None):
        yield


@contextmanager
def reusing_row_statistics(kept: list[Tensor]) -> Iterator[None]:
    """Recomputation of the same region: take from ``kept``, in the order of the first pass."""
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
    """What ``compute`` returns, or returned in the region's first forward pass."""
    if _remaining is not None:
        if not _remaining:
            raise RuntimeError("The recomputation has more PolyNorms than its first forward pass.")
        return _remaining.popleft()
    statistics = compute()
    if _kept is not None:
        _kept.append(statistics)
    return statistics
