"""Translation of the configuration to the engine's ``TransformerConfig``."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from megatron.core.transformer.transformer_config import TransformerConfig

from megapoly import activations
from megapoly.config import Config, ffn_width


def transformer_config(config: Config, *, on_cpu: bool) -> TransformerConfig:
    """Return the engine's configuration of model and layout.

    Args:
        config: resolved.
        on_cpu: make parameters on torch's default device (CPU, or meta under
            ``torch.device("meta")``) and not on the current GPU.
    """
    model, parallel = config.model, config.parallel
    interleaved = parallel.virtual_pipeline_model_parallel_size is not None
    dtype = torch.bfloat16 if config.training.bf16 else torch.float32
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        kv_channels=model.kv_channels,
        ffn_hidden_size=ffn_width(model, model.ffn_hidden_size),
        normalization="RMSNorm",
        layernorm_epsilon=model.normalization_eps,
        qk_layernorm=model.qk_norm == "head",
        add_bias_linear=False,
        hidden_dropout=model.hidden_dropout,
        attention_dropout=model.attention_dropout,
        gated_linear_unit=activations.get(model.activation).gated,
        # The engine reads `MLPSubmodules.activation_func` only with this flag, which in spite of
        # its name does not need Transformer Engine (transformer/mlp.py:135). The flag requires
        # one of the engine's functions below (transformer_config.py:1511), which is never called.
        use_te_activation_func=True,
        activation_func=F.silu,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,  # there are no biases
        masked_softmax_fusion=False,  # the engine's attention is not used
        apply_rope_fusion=bool(model.apply_rope_fusion),
        gradient_accumulation_fusion=bool(config.training.gradient_accumulation_fusion),
        attention_softmax_in_fp32=True,
        # megapoly.model.initialization sets the weights, the same at every layout.
        perform_initialization=False,
        use_cpu_initialization=on_cpu,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=config.training.bf16,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        cp_comm_type=parallel.cp_comm_type,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        expert_tensor_parallel_size=parallel.expert_tensor_parallel_size,
        sequence_parallel=bool(parallel.sequence_parallel),
        recompute_granularity=parallel.recompute_granularity,
        recompute_method=parallel.recompute_method,
        recompute_num_layers=parallel.recompute_num_layers,
        recompute_modules=list(parallel.recompute_modules),
        # Only nccl batches sends and receives; gloo sends one by one (p2p_communication.py). An
        # interleaved schedule without overlap gives a wrong loss on gloo, without an error.
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not (on_cpu or interleaved),
        **_moe_arguments(config),
        **_fp8_arguments(config),
    )


def _moe_arguments(config: Config) -> dict[str, object]:
    model = config.model
    if not model.num_moe_experts:
        return {}
    assert model.moe_ffn_hidden_size is not None
    shared = model.moe_shared_expert_intermediate_size
    return {
        "num_moe_experts": model.num_moe_experts,
        "moe_ffn_hidden_size": ffn_width(model, model.moe_ffn_hidden_size),
        "moe_shared_expert_intermediate_size": None if not shared else ffn_width(model, shared),
        "moe_router_topk": model.moe_router_topk,
        "moe_router_pre_softmax": model.moe_router_pre_softmax,
        "moe_router_dtype": model.moe_router_dtype,
        "moe_router_load_balancing_type": "aux_loss" if model.moe_aux_loss_coeff else "none",
        "moe_aux_loss_coeff": model.moe_aux_loss_coeff,
        "moe_z_loss_coeff": model.moe_z_loss_coeff or None,
        "moe_token_dispatcher_type": model.moe_token_dispatcher_type,
        "moe_grouped_gemm": model.moe_grouped_gemm,
        "moe_permute_fusion": bool(model.moe_permute_fusion),
    }


def _fp8_arguments(config: Config) -> dict[str, object]:
    """Use FP8 for matrix products alone; weights (`fp8_param`) and attention stay in bf16.

    Initial weights, the optimizer's master weights and checkpoints are then the same as in bf16.
    """
    training = config.training
    if training.fp8 is None:
        return {}
    arguments: dict[str, object] = {"fp8": training.fp8, "fp8_recipe": training.fp8_recipe}
    if training.fp8_recipe == "delayed":
        arguments["fp8_amax_history_len"] = training.fp8_amax_history_len
        arguments["fp8_amax_compute_algo"] = training.fp8_amax_compute_algo
    return arguments | {"first_last_layers_bf16": training.first_last_layers_bf16}
