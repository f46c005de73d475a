"""Floating-point operations of a model, and what devices can do."""

from __future__ import annotations

from megapoly import activations
from megapoly.config import Config, ffn_width, padded_vocab_size

# Dense bf16 peak of one device, TFLOP/s without sparsity, by a part of the name that
# torch.cuda.get_device_name returns. Source: NVIDIA's data sheets of A100, H100 SXM and H200 SXM.
PEAK_TFLOPS_BF16 = {"A100": 312.0, "H100": 989.0, "H200": 989.0}


def peak_tflops(device_name: str) -> float | None:
    """Dense bf16 peak of a device in TFLOP/s, or None for one that is not in the table."""
    return next((peak for name, peak in PEAK_TFLOPS_BF16.items() if name in device_name), None)


def training_flops_per_token(config: Config) -> int:
    """Operations to train on one token: forward once, backward twice that.

    Matrix products only, two operations a multiply-add: projections, router, the active experts,
    output layer; attention counts the causal half of its [s, s] products. Recomputation is not
    counted.
    """
    model = config.model
    assert model.kv_channels is not None and model.num_query_groups is not None
    query = model.num_attention_heads * model.kv_channels
    key_value = 2 * model.num_query_groups * model.kv_channels
    projections = model.hidden_size * (2 * query + key_value)
    attention = query * config.training.seq_length  # QK^T and PV, half of each
    layer = projections + attention + _ffn_multiply_adds(config)
    output = model.hidden_size * padded_vocab_size(config)
    return 3 * 2 * (model.num_layers * layer + output)


def _ffn_multiply_adds(config: Config) -> int:
    model = config.model
    matrices = 3 if activations.get(model.activation).gated else 2

    def ffn(size: int) -> int:
        return matrices * model.hidden_size * ffn_width(model, size)

    if not model.num_moe_experts:
        return ffn(model.ffn_hidden_size)
    assert model.moe_ffn_hidden_size is not None
    routed = model.moe_router_topk * ffn(model.moe_ffn_hidden_size)
    shared = ffn(model.moe_shared_expert_intermediate_size or 0)
    return routed + shared + model.hidden_size * model.num_moe_experts
