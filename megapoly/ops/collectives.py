"""Sums over the ranks that share one row, forward and backward."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import Function, FunctionCtx


def is_split(group: dist.ProcessGroup | None) -> bool:
    """Whether a row is cut over more than one rank."""
    return group is not None and group.size() > 1


def all_reduce_sum(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Sum ``x`` over the group, in place; one rank: nothing to do."""
    if is_split(group):
        dist.all_reduce(x, group=group)
    return x


class _SumOverRanks(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return all_reduce_sum(x.clone(), group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return all_reduce_sum(grads[0].clone(), ctx.group), None


class _SumGradients(Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group  # type: ignore[attr-defined]
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return all_reduce_sum(grads[0].clone(), ctx.group), None


class _ScaleGradient(Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor  # type: ignore[attr-defined]
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.factor, None


def sum_over_ranks(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Sum of a per-row statistic over the ranks that share the row.

    Every rank goes on with the sum for its own columns, so the gradient is the sum over the ranks
    too: one all-reduce in each direction.
    """
    return _SumOverRanks.apply(x, group) if is_split(group) else x


def sum_gradients(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """``x`` itself; its gradient is summed over the ranks that each saw a part of the columns."""
    return _SumGradients.apply(x, group) if is_split(group) else x


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """``x`` itself; its gradient is multiplied by ``factor``."""
    return _ScaleGradient.apply(x, factor) if factor != 1.0 else x
