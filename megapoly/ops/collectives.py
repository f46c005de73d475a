"""Sums over the ranks that share one row, forward and backward."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import Function, FunctionCtx

from megapoly.errors import ShapeError

# Parts of a row that a deterministic sum adds in a fixed order, for any number of ranks.
NUM_SEGMENTS = 8


def is_split(group: dist.ProcessGroup | None) -> bool:
    """Return whether rows are split over more than one rank."""
    return group is not None and group.size() > 1


def name_of(group: dist.ProcessGroup | None) -> str:
    """Return the name of a group for an operator's schema; "" if rows are not split."""
    return group.group_name if group is not None and is_split(group) else ""


def size_of(group_name: str) -> int:
    """Return the number of ranks of a named group."""
    return _resolve(group_name).size() if group_name else 1


def _resolve(group_name: str) -> dist.ProcessGroup:
    c10d: Any = dist.distributed_c10d
    group: dist.ProcessGroup = c10d._resolve_process_group(group_name)
    return group


def check_segments(width: int, num_ranks: int) -> None:
    """Raise :class:`ShapeError` if a row cannot be split into the segments of a fixed sum."""
    if NUM_SEGMENTS % num_ranks or width * num_ranks % NUM_SEGMENTS:
        raise ShapeError(
            f"A deterministic sum splits a row into {NUM_SEGMENTS} equal segments: the ranks that "
            f"share it ({num_ranks}) must be 1, 2, 4 or 8 and its width ({width * num_ranks}) "
            f"divisible by {NUM_SEGMENTS}; change them, or disable `deterministic`."
        )


def segments(x: Tensor, num_ranks: int) -> tuple[Tensor, ...]:
    """Split a rank's columns, [rows, d / tp], into its segments of the row."""
    return x.chunk(NUM_SEGMENTS // num_ranks, dim=-1)


class PendingSum:
    """Asynchronous sum over ranks; :meth:`wait` returns the result.

    Args:
        part: this rank's part; with ``deterministic`` [segments of this rank, ..].
        group_name: see :func:`name_of`.
        deterministic: add all segments as a fixed binary tree, after an all-gather instead of an
            all-reduce. The bits of the sum then do not depend on the number of ranks.
    """

    def __init__(self, part: Tensor, group_name: str, *, deterministic: bool) -> None:
        self.deterministic = deterministic
        self.group_name = group_name
        self._work: dist.Work | None = None
        if not group_name:
            self._result = part
        elif deterministic:
            group = _resolve(group_name)
            self._result = part.new_empty(part.shape[0] * group.size(), *part.shape[1:])
            self._work = dist.all_gather_into_tensor(
                self._result, part.contiguous(), group=group, async_op=True
            )
        else:
            self._result = part.contiguous()
            self._work = dist.all_reduce(self._result, group=_resolve(group_name), async_op=True)

    def wait(self) -> Tensor:
        """Return the sum, the same on every rank."""
        if self._work is not None:
            self._work.wait()
        return tree_sum(self._result) if self.deterministic else self._result


def tree_sum(parts: Tensor) -> Tensor:
    """Sum [2^n, ..] to [..] in pairs, pairs of pairs and so on."""
    while len(parts) > 1:
        parts = parts[0::2] + parts[1::2]
    return parts[0]


class _ScaleGradient(Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor  # type: ignore[attr-defined]
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.factor, None


def sum_over_ranks(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Sum a per-row statistic over the ranks that share the row; without a gradient."""
    if is_split(group):
        x = x.clone()
        dist.all_reduce(x, group=group)
    return x


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """Return ``x``; its gradient is multiplied by ``factor``."""
    return _ScaleGradient.apply(x, factor) if factor != 1.0 else x
