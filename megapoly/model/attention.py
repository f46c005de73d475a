"""Core attention through torch's scaled-dot-product attention."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from megapoly.model.context_parallel import (
    gather_sequence,
    heads_for_sequence,
    pieces_of_rank,
    sequence_for_heads,
)


class ScaledDotProductAttention(MegatronModule):
    """Causal attention, softmax(q k^T / sqrt(d)) v, that never materialises the [s, s] matrix.

    Source: replaces ``DotProductAttention`` (transformer/dot_product_attention.py) in the local
    layer spec, with the same interface.

    Args:
        config: the engine's configuration; its ``attention_dropout`` applies in training.
        layer_number: 1-based; not used.
        attn_mask_type: must be causal.
        attention_type: not used.
        attention_dropout: replaces the configuration's; None: the configuration's.
        softmax_scale: replaces 1 / sqrt(d); None: 1 / sqrt(d).
        cp_comm_type: communication between the ranks that share a sequence: ``all_gather`` (each
            gathers all keys and values) or ``a2a`` (each gets whole sequences of some heads).
        pg_collection: process groups, of which the context-parallel one is used.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
    ) -> None:
        super().__init__(config=config)
        if attn_mask_type is not AttnMaskType.causal:
            raise ValueError(f"`attn_mask_type` must be causal, got {attn_mask_type}")
        self.cp_group = None
        if config.context_parallel_size > 1:
            if cp_comm_type not in ("all_gather", "a2a"):
                raise ValueError(f"`cp_comm_type` must be all_gather or a2a, got {cp_comm_type}")
            self.cp_group = pg_collection.cp
        self.cp_comm_type = cp_comm_type
        self.softmax_scale = softmax_scale
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """Attend: query [s, b, heads, d], key and value [s, b, groups, d] -> [s, b, heads * d].

        ``attention_mask`` has no effect: the mask is causal. With context parallelism s is the part
        of the sequence on this rank, see :mod:`megapoly.model.context_parallel`.
        """
        if attention_bias is not None or packed_seq_params is not None:
            raise ValueError("attention bias and packed sequences are not supported")
        if self.cp_group is None:
            output = self._attend(query, key, value)
        elif self.cp_comm_type == "a2a":
            exchanged = (heads_for_sequence(t, self.cp_group) for t in (query, key, value))
            output = sequence_for_heads(self._attend(*exchanged), self.cp_group)
        else:
            key, value = (gather_sequence(t, self.cp_group) for t in (key, value))
            output = torch.cat(
                [
                    self._attend(piece, *(t[: len(piece) * (i + 1)] for t in (key, value)))
                    for i, piece in zip(pieces_of_rank(self.cp_group), query.chunk(2), strict=True)
                ]
            )
        return output.flatten(2)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend [q, b, heads, d] to [k, b, groups, d], aligned at their last elements."""
        query, key, value = (t.permute(1, 2, 0, 3) for t in (query, key, value))  # [b, heads, s, d]
        square = query.shape[2] == key.shape[2]
        dropout = self.dropout if self.training else 0.0
        with self._random_state(dropout):
            output = F.scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=None if square else causal_lower_right(query.shape[2], key.shape[2]),
                is_causal=square,
                dropout_p=dropout,
                scale=self.softmax_scale,
                enable_gqa=query.shape[1] != key.shape[1],
            )
        return output.permute(2, 0, 1, 3)

    def _random_state(self, dropout: float) -> Any:
        """Fork the generator: tensor-parallel ranks have other heads and need other dropout.

        With sequence parallelism the engine has already forked it for the whole layer.
        """
        if dropout == 0.0 or self.config.sequence_parallel:
            return contextlib.nullcontext()
        return get_cuda_rng_tracker().fork()

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return nothing: there are no parameters."""
        return {}
