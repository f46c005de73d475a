"""Count parameters."""

from __future__ import annotations

from typing import NamedTuple

from megatron.core.models.gpt import GPTModel


class ParameterCount(NamedTuple):
    """Parameters of a model.

    Args:
        total: all parameters.
        active: parameters that one token uses: all except the experts that it is not routed to.
    """

    total: int
    active: int


def count_parameters(model: GPTModel) -> ParameterCount:
    """Count the parameters of a whole model, which may be on the meta device.

        active = total - (E - topk) / E routed

    Args:
        model: not split over ranks. ``routed`` are the parameters that belong to one of its E
            experts: matrices, and coefficients of the activation if they are not shared.

    Note:
        A weight that embedding and output layer share counts once. Padding of the vocabulary
        counts.
    """
    total = sum(parameter.numel() for parameter in model.parameters())
    # Parameters in the engine's expert buffers, see megapoly.model.experts and FFNActivation.
    routed = sum(p.numel() for p in model.parameters() if not getattr(p, "allreduce", True))
    if not routed:
        return ParameterCount(total, total)
    experts, topk = model.config.num_moe_experts, model.config.moe_router_topk
    return ParameterCount(total, total - routed * (experts - topk) // experts)
