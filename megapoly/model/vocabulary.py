"""Padding of the vocabulary: rows of embedding and output layer that belong to no token.

They make the number of rows divisible and are not a part of the model: their weights are zero from
the start, and with the logits set here their gradients are zero in every step.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear
from torch import Tensor


def exclude_padding(output_layer: ColumnParallelLinear, vocab_size: int) -> None:
    """Make every logit of the padding -inf, so that a softmax over all columns excludes it.

    The engine's cross-entropy first takes the maximum over all ranks, so a rank that holds only
    padding adds exp(-inf) = 0 to the sum and gets zero gradients, not NaN.

    Args:
        output_layer: each of its outputs is changed in place, [s, b, columns of this rank] or
            gathered, [s, b, all columns].
        vocab_size: token ids of the model; the columns from this one on are padding.
    """
    if output_layer.output_size == vocab_size:
        return

    def hide(layer: Any, args: Any, output: tuple[Tensor, Tensor | None]) -> None:
        logits = output[0]
        width = logits.shape[-1]
        first = 0 if width == layer.output_size else layer.tp_group.rank() * width
        # Hidden from autograd, which would copy the gradient of all logits to set the padding's
        # to zero; in a softmax it already is p = exp(-inf) = 0.
        with torch.no_grad():
            logits[..., max(0, vocab_size - first) :] = -torch.inf

    output_layer.register_forward_hook(hide)
