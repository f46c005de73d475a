"""Layer specs: the engine's, with our activation, experts, norms and attention in their slots."""

from __future__ import annotations

from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig

from megapoly.config import ModelConfig
from megapoly.model.attention import ScaledDotProductAttention
from megapoly.model.experts import GroupedExperts, SequentialExperts
from megapoly.model.ffn_activation import ActivationSettings, FFNActivation
from megapoly.model.grouped_linear import ColumnParallelGroupedLinear, RowParallelGroupedLinear
from megapoly.model.norms import ProjectionRMSNorm, RMSNorm


def decoder_spec(
    model: ModelConfig, engine: TransformerConfig, *, vp_stage: int | None = None
) -> TransformerBlockSubmodules:
    """Return the specs of the layers of this pipeline stage.

    Args:
        model: resolved configuration of the model; ``transformer_engine`` selects the family of
            linear, norm and attention modules.
        engine: the same, translated to the engine's ``TransformerConfig``.
        vp_stage: chunk of an interleaved stage; None without interleaving.
    """
    make_layer = _transformer_engine_layer if model.transformer_engine else _local_layer
    layer = make_layer(model)
    _set_qk_norm(layer, model)
    _set_experts(layer, model)
    _set_activation(layer, model)
    return TransformerBlockSubmodules(
        layer_specs=[layer] * get_num_layers_to_build(engine, vp_stage),
        layer_norm=_final_norm(model),
    )


def _final_norm(model: ModelConfig) -> type:
    if model.transformer_engine:
        from megatron.core.extensions.transformer_engine import TENorm

        return TENorm
    return RMSNorm


def _local_layer(model: ModelConfig) -> ModuleSpec:
    """Use the engine's linear layers, torch's scaled-dot-product attention and torch's RMSNorm."""
    layer = get_gpt_layer_local_spec(
        num_experts=model.num_moe_experts,
        qk_layernorm=model.qk_norm == "head",
        normalization="RMSNorm",
    )
    parts = layer.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = RMSNorm
    attention = parts.self_attention.submodules
    attention.core_attention = ScaledDotProductAttention
    if model.qk_norm == "head":
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    if model.num_moe_experts:
        # Unlike Transformer Engine's spec, the local spec saves the norm before an MoE layer under
        # its name in a dense layer's fused FC1 (gpt_layer_specs.py:419).
        parts.sharded_state_dict_keys_map = {
            key: value
            for key, value in parts.sharded_state_dict_keys_map.items()
            if key != "pre_mlp_layernorm."
        }
        if model.moe_grouped_gemm:
            parts.mlp.submodules.experts.submodules = MLPSubmodules(
                linear_fc1=ColumnParallelGroupedLinear, linear_fc2=RowParallelGroupedLinear
            )
    return layer


def _transformer_engine_layer(model: ModelConfig) -> ModuleSpec:
    """Use Transformer Engine's fused norm + linear, grouped linear and attention."""
    return get_gpt_layer_with_transformer_engine_spec(
        num_experts=model.num_moe_experts,
        moe_grouped_gemm=bool(model.num_moe_experts) and model.moe_grouped_gemm,
        qk_layernorm=model.qk_norm == "head",
    )


def _set_experts(layer: ModuleSpec, model: ModelConfig) -> None:
    """Set the module around the linear maps of the experts, which are grouped or one per expert."""
    if model.num_moe_experts:
        experts = GroupedExperts if model.moe_grouped_gemm else SequentialExperts
        layer.submodules.mlp.submodules.experts.module = experts


def _set_qk_norm(layer: ModuleSpec, model: ModelConfig) -> None:
    if model.qk_norm != "full":
        return
    attention = layer.submodules.self_attention.submodules
    heads, groups = model.num_attention_heads, model.num_query_groups
    attention.q_layernorm = ModuleSpec(ProjectionRMSNorm, params={"num_heads": heads})
    attention.k_layernorm = ModuleSpec(ProjectionRMSNorm, params={"num_heads": groups})


def _set_activation(layer: ModuleSpec, model: ModelConfig) -> None:
    """Fill every activation slot of the layer: dense FFN, or routed and shared experts."""
    activation = ModuleSpec(FFNActivation, params={"settings": activation_settings(model)})
    ffn = layer.submodules.mlp.submodules
    if model.num_moe_experts:
        ffn.experts.submodules.activation_func = activation
        ffn.shared_experts.submodules.activation_func = activation
    else:
        ffn.activation_func = activation


def activation_settings(model: ModelConfig) -> ActivationSettings:
    """Return the activation's part of the configuration."""
    return ActivationSettings(
        name=model.activation,
        order=model.activation_order,
        coefficients=model.activation_coefficients,
        norm=model.activation_norm,
        eps=model.activation_eps,
        backend=model.activation_backend,
        deterministic=model.activation_deterministic,
    )
