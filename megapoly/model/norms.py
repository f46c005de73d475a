"""RMSNorms for the local layer spec."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import make_tp_sharded_tensor_for_checkpoint
from torch import Tensor

from megapoly.ops.collectives import sum_over_ranks


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm with the engine's constructor, right under sequence parallelism.

    Source: takes the place of ``WrappedTorchNorm`` (transformer/torch_norm.py:35), which refuses
    sequence parallelism.

    Args:
        config: the engine's configuration.
        hidden_size: width that is normalised.
        eps: added to the mean square.
        **unused: arguments of the engine's other norms.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: Any
    ) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        # Each rank normalises its own part of the sequence; the engine adds up the gradients.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class ProjectionRMSNorm(MegatronModule):
    """RMSNorm over a whole query or key projection, before the heads are told apart (OLMoE).

        y = w x / sqrt(mean(x^2) + eps),   the mean over all heads of all tensor-parallel ranks

    Source: OLMoE (arXiv:2409.02060); fills ``q_layernorm`` / ``k_layernorm`` of the engine's
    ``SelfAttentionSubmodules``, whose own norms are over each head.

    Args:
        config: the engine's configuration.
        hidden_size: width of one head.
        eps: added to the mean square.
        num_heads: heads of the projection over all ranks.
        **unused: arguments of the engine's other norms.

    Note:
        The weight is cut over the tensor-parallel ranks as the heads are. One all-reduce of one
        number a token in each direction.
    """

    def __init__(
        self,
        config: TransformerConfig,
        hidden_size: int,
        eps: float = 1e-5,
        *,
        num_heads: int,
        **unused: Any,
    ) -> None:
        super().__init__(config=config)
        self.tp_group = parallel_state.get_tensor_model_parallel_group()
        self.eps = eps
        self.width = num_heads * hidden_size
        local_width = self.width // self.tp_group.size()
        self.weight = torch.nn.Parameter(torch.ones(local_width, dtype=config.params_dtype))
        self.weight.tensor_model_parallel = self.tp_group.size() > 1  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """[s, b, heads / tp, d] -> the same shape and dtype; the mean is fp32."""
        flat = x.flatten(-2).float()  # [s, b, heads / tp * d]
        square_sum = sum_over_ranks(flat.square().sum(-1, keepdim=True), self.tp_group)
        normalised = flat * (square_sum / self.width + self.eps).rsqrt()
        return (normalised.type_as(x) * self.weight).view(x.shape)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: Any = None
    ) -> dict[str, Any]:
        """The weight is one tensor, cut over the tensor-parallel ranks."""
        name = f"{prefix}weight"
        tensor = make_tp_sharded_tensor_for_checkpoint(
            self.weight,
            name,
            prepend_offsets=sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )
        return {name: tensor}
