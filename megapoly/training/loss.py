"""Cross-entropy of a micro-batch, and the mean that a step trains on.

With the losses l_t of tokens that are 1 in ``loss_mask`` (m_t) and K micro-batches on all ranks:

    mean over micro-batches:        L = 1/K sum_k (sum_(t in k) m_t l_t / sum_(t in k) m_t)
    mean over the tokens of a step: L = sum_t m_t l_t / sum_t m_t

They differ where micro-batches have different numbers of unmasked tokens. The second is the same
at every ``micro_batch_size`` (``training.calculate_per_token_loss``).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megapoly.data.loader import Batch
from megapoly.errors import DataError
from megapoly.platform.device import Platform
from megapoly.training.distributed import sum_over_all

Losses = dict[str, Tensor]


def mean_tokens_per_microbatch(step: Sequence[Batch], platform: Platform) -> float:
    """Return the mean number of unmasked tokens in the micro-batches of a step; collective.

    With it as the divisor of every micro-batch, the mean over micro-batches is the mean over the
    tokens of the step. The engine has an option for that mean, which is not used: it divides all
    gradients by the number of unmasked tokens at the end, and so scales the router's losses by
    tokens / (unmasked tokens * tensor-parallel size * context-parallel size)
    (transformer/moe/router.py:456, distributed/finalize_model_grads.py:518 in 0.16.1).

    Args:
        step: this rank's micro-batches, whole sequences.
        platform: device of this rank.

    Raises:
        DataError: every token of the step is masked, on all ranks.
    """
    local = float(sum(batch["loss_mask"].sum(dtype=torch.float64) for batch in step))
    # Ranks that share sequences all count them: that is a factor of both sums.
    num_tokens, num_microbatches = sum_over_all([local, float(len(step))], platform)
    if num_tokens == 0:
        raise DataError(
            "a step must have tokens that are not masked, and all of one step are: with "
            "`data.eod_mask_loss` its documents have no token but their end. Train on other text, "
            "or set `data.eod_mask_loss` to false."
        )
    return num_tokens / num_microbatches


def masked_mean(
    divisor: float | None, loss_mask: Tensor, token_losses: Tensor
) -> tuple[Tensor, Losses]:
    """Return the sum of [b, s / cp] losses over unmasked tokens of whole sequences, divided.

    The first result is this rank's share: the engine multiplies it by the context-parallel size,
    divides it by the number of micro-batches and averages the gradients over the ranks
    (pipeline_parallel/schedules.py:268). The whole is what is logged.

    Args:
        divisor: number of tokens to divide by; None: the micro-batch's unmasked tokens, or 1 if
            there are none.
        loss_mask: 1 for tokens that count, 0 for others; the shape of ``token_losses``.
        token_losses: cross-entropy in nats.
    """
    loss_sum = (token_losses.float() * loss_mask).sum()
    sums = torch.stack([loss_sum.detach(), loss_mask.sum()])
    if parallel_state.get_context_parallel_world_size() > 1:
        dist.all_reduce(sums, group=parallel_state.get_context_parallel_group())
    total, num_tokens = sums.unbind()
    used = num_tokens.clamp_min(1.0) if divisor is None else divisor
    return loss_sum / used, {"mean": total / used, "sum": total, "num_tokens": num_tokens}
