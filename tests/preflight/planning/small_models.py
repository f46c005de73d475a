"""Models that tests plan and build."""

from __future__ import annotations

from typing import Any

from layouts import small_config

from megapoly.config import Config

_SMALL = {
    "model.num_layers": 2,
    "model.hidden_size": 64,
    "model.num_attention_heads": 4,
    "model.ffn_hidden_size": 96,
    "model.vocab_size": 250,
    "model.init_method_std": 0.02,
    "training.seq_length": 32,
    "training.micro_batch_size": 2,
    "training.global_batch_size": 8,
}
EXPERTS = {
    "model.num_moe_experts": 4,
    "model.moe_router_topk": 2,
    "model.moe_ffn_hidden_size": 48,
}


def small_model(options: dict[str, Any]) -> Config:
    """A resolved configuration with options set by their dotted names."""
    return small_config(_SMALL | options)
