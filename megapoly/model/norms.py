"""RMSNorms for the local layer spec."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import make_tp_sharded_tensor_for_checkpoint
from torch import Tensor
from torch.autograd.function import Function

from megapoly.ops.collectives import sum_over_ranks


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm with the engine's constructor and support for sequence parallelism.

    Source: replaces ``WrappedTorchNorm`` (transformer/torch_norm.py:35), which does not support
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
        # Each rank normalises its own part of the sequence; the engine sums the gradients.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class ProjectionRMSNorm(MegatronModule):
    """RMSNorm over a whole query or key projection, before it is split into heads (OLMoE).

        y = w x / sqrt(mean(x^2) + eps),   the mean over all heads of all tensor-parallel ranks

    Source: OLMoE (arXiv:2409.02060); fills ``q_layernorm`` / ``k_layernorm`` of the engine's
    ``SelfAttentionSubmodules``; the engine's own norms are over each head.

    Args:
        config: the engine's configuration.
        hidden_size: width of one head.
        eps: added to the mean square.
        num_heads: heads of the projection over all ranks.
        **unused: arguments of the engine's other norms.

    Note:
        The weight is split over the tensor-parallel ranks like the heads. Each direction has one
        all-reduce of one number per token.
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
        """Normalise [s, b, heads / tp, d] to the same shape and dtype; the mean is fp32."""
        return _NormalizedProjection.apply(x, self.weight, self.tp_group, self.width, self.eps)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: Any = None
    ) -> dict[str, Any]:
        """Return the weight as one tensor, sharded over the tensor-parallel ranks."""
        name = f"{prefix}weight"
        tensor = make_tp_sharded_tensor_for_checkpoint(
            self.weight,
            name,
            prepend_offsets=sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )
        return {name: tensor}


class _NormalizedProjection(Function):
    """y = w (x r),  r = 1 / sqrt(mean(x^2) + eps); saves x and r, fp32 [s, b, 1].

    The product x r is rounded to the dtype of x before it is weighted, as in torch's RMSNorm.
    With z = x r and g = w dL/dy:  dL/dx = r (g - z mean(g z)),  dL/dw = sum of dL/dy z.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, group: dist.ProcessGroup, width: int, eps: float
    ) -> Tensor:
        flat = x.flatten(-2).float()  # [s, b, heads / tp * d]
        square_sum = sum_over_ranks(flat.square().sum(-1, keepdim=True), group)
        rsqrt = (square_sum / width + eps).rsqrt()
        ctx.save_for_backward(x, weight, rsqrt)
        ctx.group, ctx.width = group, width
        return ((flat * rsqrt).type_as(x) * weight).view(x.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        x, weight, rsqrt = ctx.saved_tensors
        grad = grads[0].flatten(-2)
        z = x.flatten(-2).float() * rsqrt
        grad_weight = (grad * z.type_as(x)).flatten(0, -2).sum(0)
        g = (grad * weight).float()
        mean = sum_over_ranks((g * z).sum(-1, keepdim=True), ctx.group) / ctx.width
        return (rsqrt * (g - z * mean)).type_as(x).view(x.shape), grad_weight, None, None, None
