"""Log-probabilities of tokens from logits that ranks split along the vocabulary."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def token_scores(
    logits: Tensor, targets: Tensor, *, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor]:
    """Return log-probabilities of targets, and which of them are the argmax; collective.

        log p(t) = z_t - m - log sum_v exp(z_v - m),    m = max_v z_v

    Takes three reductions over the ranks, each of one or two numbers per token. Of several equally
    likely tokens the one with the smallest id counts, as in ``argmax``.

    Args:
        logits: [n, columns of this rank]; ranks hold equal parts in order, and columns without a
            token are -inf.
        targets: [n] token ids in the full vocabulary.
        group: ranks that share the vocabulary.

    Returns:
        [n] fp32 log-probabilities and [n] booleans, the same on every rank of ``group``.
    """
    logits = logits.float()
    width = logits.shape[-1]
    first = group.rank() * width
    local_highest, local_best = logits.max(dim=-1)
    highest = local_highest.clone()
    dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)

    # Ranks without the highest logit contribute a number above every id.
    best = torch.where(local_highest == highest, local_best + first, width * group.size())
    dist.all_reduce(best, op=dist.ReduceOp.MIN, group=group)

    column = targets - first
    is_here = (column >= 0) & (column < width)
    of_target = logits.gather(-1, column.clamp(0, width - 1).unsqueeze(-1)).squeeze(-1) - highest
    sums = torch.stack(
        [
            torch.where(is_here, of_target, 0.0),
            (logits - highest.unsqueeze(-1)).exp().sum(dim=-1),
        ]
    )
    dist.all_reduce(sums, group=group)
    return sums[0] - sums[1].log(), best == targets
