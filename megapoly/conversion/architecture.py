"""Convert between a model's configuration and the ``config.json`` of a Hugging Face folder.

A model that Llama or OLMoE describes exactly is exported as that architecture, so that it opens
without remote code. Every other model is exported as ``megapoly``, together with the code in
:mod:`megapoly.conversion.remote_code`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from megapoly.activations import registry
from megapoly.config import ModelConfig, ffn_width
from megapoly.conversion.rotary import rotary_base, unsupported_positions
from megapoly.errors import CheckpointError

ModelType = Literal["llama", "olmoe", "megapoly"]
MODEL_TYPE = "megapoly"
CODE_FILES = ("configuration_megapoly.py", "ffn_megapoly.py", "modeling_megapoly.py")

_AUTO_MAP = {
    "AutoConfig": "configuration_megapoly.MegapolyConfig",
    "AutoModel": "modeling_megapoly.MegapolyModel",
    "AutoModelForCausalLM": "modeling_megapoly.MegapolyForCausalLM",
}
_CLASSES = {
    "llama": "LlamaForCausalLM",
    "olmoe": "OlmoeForCausalLM",
    MODEL_TYPE: "MegapolyForCausalLM",
}
# Defaults in transformers if config.json does not set the value.
_DEFAULT_ACT = "silu"
_DEFAULT_POSITIONS = {"llama": 2048, "olmoe": 4096, "mistral": 131_072, MODEL_TYPE: 4096}
# Mistral without a window is Llama; transformers has this one if config.json does not set it.
_MISTRAL_WINDOW = {"sliding_window": 4096}
# Activations that a PolyCom release may name; case and underscores are ignored.
_RELEASED_ACTS = ("polynorm", "polyrelu")


def model_type(model: ModelConfig) -> ModelType:
    """Return the architecture that a resolved model is exported as."""
    has_name = registry.get(model.activation).hidden_act is not None
    if not has_name or model.moe_shared_expert_intermediate_size:
        return "megapoly"
    if model.num_moe_experts is None:
        return "llama" if model.qk_norm == "none" else "megapoly"
    # OLMoE's norms are as wide as hidden_size, whatever the heads are.
    usual_heads = model.num_attention_heads * int(model.kv_channels or 0) == model.hidden_size
    return "olmoe" if model.qk_norm == "full" and usual_heads else "megapoly"


def hf_config(
    model: ModelConfig,
    *,
    seq_length: int,
    dtype: str,
    bos: int | None,
    eos: int | list[int],
    pad: int | None,
) -> dict[str, Any]:
    """Return the content of ``config.json`` for a model.

    Args:
        model: resolved.
        seq_length: sequence length that it was trained with.
        dtype: dtype of the weights by torch's name, such as ``float32``.
        bos: id that texts begin with; None if there is none.
        eos: id that ends a document, or ids that end a text.
        pad: id of padding; None if there is no separate one.
    """
    kind = model_type(model)
    common = {
        "architectures": [_CLASSES[kind]],
        "model_type": kind,
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_query_groups,
        "head_dim": model.kv_channels,
        "max_position_embeddings": model.max_position_embeddings or seq_length,
        "rms_norm_eps": model.normalization_eps,
        "rope_theta": float(model.rotary_base),
        "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
        "initializer_range": model.init_method_std,
        "attention_dropout": model.attention_dropout,
        "use_cache": True,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "pad_token_id": pad,
        # transformers 4 reads the second, 5 the first.
        "dtype": dtype,
        "torch_dtype": dtype,
    }
    return common | (_megapoly_fields(model) if kind == MODEL_TYPE else _library_fields(model))


def _library_fields(model: ModelConfig) -> dict[str, Any]:
    """Return the fields that only Llama and OLMoE have."""
    fields: dict[str, Any] = {
        "hidden_act": registry.get(model.activation).hidden_act,
        "attention_bias": False,
        # transformers 5 reads this, 4 the `rope_theta` above.
        "rope_parameters": {"rope_type": "default", "rope_theta": float(model.rotary_base)},
    }
    if model.num_moe_experts is None:
        return fields | {
            "intermediate_size": ffn_width(model, model.ffn_hidden_size),
            "mlp_bias": False,
        }
    assert model.moe_ffn_hidden_size is not None, "resolved"
    return fields | {
        "intermediate_size": ffn_width(model, model.moe_ffn_hidden_size),
        "num_experts": model.num_moe_experts,
        **_router_fields(model, "olmoe"),
        "clip_qkv": None,
    }


def _megapoly_fields(model: ModelConfig) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "auto_map": _AUTO_MAP,
        "hidden_act": model.activation,
        "activation_order": model.activation_order,
        "activation_norm": model.activation_norm,
        "activation_eps": model.activation_eps,
        "activation_coefficients": model.activation_coefficients,
        "qk_norm": model.qk_norm,
    }
    if model.num_moe_experts is None:
        return fields | {"intermediate_size": ffn_width(model, model.ffn_hidden_size)}
    assert model.moe_ffn_hidden_size is not None, "resolved"
    shared = model.moe_shared_expert_intermediate_size
    return fields | {
        "num_experts": model.num_moe_experts,
        "intermediate_size": ffn_width(model, model.moe_ffn_hidden_size),
        "shared_expert_intermediate_size": ffn_width(model, shared) if shared else None,
        **_router_fields(model, "megapoly"),
    }


def _router_fields(model: ModelConfig, kind: ModelType) -> dict[str, Any]:
    scale = aux_loss_scale(kind, model.num_layers, model.moe_router_topk)
    return {
        "num_experts_per_tok": model.moe_router_topk,
        # The softmax over the chosen logits is the softmax over all, divided by its sum over these.
        "norm_topk_prob": not model.moe_router_pre_softmax,
        "router_aux_loss_coef": _rounded(model.moe_aux_loss_coeff * scale),
        # transformers computes no z-loss; the value is for an import.
        "router_z_loss_coef": model.moe_z_loss_coeff,
        "output_router_logits": False,
    }


def aux_loss_scale(kind: ModelType, num_layers: int, topk: int) -> float:
    r"""Return ``router_aux_loss_coef / moe_aux_loss_coeff`` for the same load-balancing loss.

    With f_e the share of tokens that choose expert e and p_e its mean probability, the engine adds
    :math:`c \sum_l E/k \sum_e f_{le} p_{le}` (``switch_load_balancing_loss_func``, for every
    layer l). An export's own code has the mean over layers in place of the sum. OLMoE in
    transformers has :math:`E \sum_e \bar f_e \bar p_e` with means over layers
    (``load_balancing_loss_func``). That is k times a mean over layers if the layers' shares are
    alike, as in a balanced model; no coefficient makes the two equal in every other case.

    Args:
        kind: architecture in transformers.
        num_layers: number of layers.
        topk: number of experts that each token is routed to.
    """
    return num_layers / topk if kind == "olmoe" else float(num_layers)


def _rounded(coefficient: float) -> float:
    """Remove the last bit, so that a coefficient that is scaled there and back is the same."""
    return float(f"{coefficient:.15g}")


def model_config(config: Mapping[str, Any], *, source: str) -> ModelConfig:
    """Return the resolved model that a ``config.json`` describes.

    Args:
        config: content of the file: Llama (also with the activations of the released PolyCom
            checkpoints), Mistral without a sliding window, OLMoE or an export of this project.
        source: name of the file, for messages.

    Raises:
        CheckpointError: the architecture is not supported, or has features that this project's
            models do not have; the message names the fields.
    """
    kind = config.get("model_type")
    if kind not in _DEFAULT_POSITIONS:
        raise CheckpointError(
            f"`model_type` in {source} must be one of {', '.join(_DEFAULT_POSITIONS)} to be "
            f"imported; it is {kind}."
        )
    if kind == "mistral":
        config = {**_MISTRAL_WINDOW, **config}
    _require(config, source)
    _refuse_unsupported(config, source)
    heads = config["num_attention_heads"]
    model = ModelConfig(
        num_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        num_attention_heads=heads,
        num_query_groups=config.get("num_key_value_heads") or heads,
        kv_channels=config.get("head_dim") or config["hidden_size"] // heads,
        scale_gated_ffn=False,
        normalization_eps=config.get(
            "rms_norm_eps", 1e-6 if kind in ("llama", "mistral") else 1e-5
        ),
        rotary_base=rotary_base(config, source),
        max_position_embeddings=max_positions(config),
        untie_embeddings_and_output_weights=not config.get("tie_word_embeddings", False),
        vocab_size=config["vocab_size"],
        init_method_std=config.get("initializer_range", 0.02),
        attention_dropout=config.get("attention_dropout", 0.0),
        transformer_engine=False,
    )
    if kind == MODEL_TYPE:
        _set_activation(model, config)
        model.qk_norm = config["qk_norm"]
    else:
        _set_library_activation(model, config, source)
        model.qk_norm = "full" if kind == "olmoe" else "none"
    if config.get("num_experts") is None:
        model.ffn_hidden_size = config["intermediate_size"]
    else:
        _set_experts(model, config)
    return model


def max_positions(config: Mapping[str, Any]) -> int:
    """Return the longest sequence that the model of a ``config.json`` takes."""
    default = _DEFAULT_POSITIONS[config.get("model_type", MODEL_TYPE)]
    return int(config.get("max_position_embeddings") or default)


_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_hidden_layers",
    "vocab_size",
)


def _require(config: Mapping[str, Any], source: str) -> None:
    missing = [name for name in _SIZES if not isinstance(config.get(name), int)]
    if missing:
        raise CheckpointError(f"{source} must set {', '.join(missing)} to whole numbers.")


def is_polycom_release(config: Mapping[str, Any]) -> bool:
    """Check whether this is Llama with an activation that transformers does not have."""
    act = config.get("hidden_act", _DEFAULT_ACT)
    return config.get("model_type") == "llama" and act not in _library_acts()


def _library_acts() -> dict[str, str]:
    """Return the registry's names of gated activations by transformers' ``hidden_act``."""
    entries = registry.ACTIVATIONS.items()
    return {entry.hidden_act: name for name, entry in entries if entry.hidden_act is not None}


def _set_activation(model: ModelConfig, config: Mapping[str, Any]) -> None:
    model.activation = config["hidden_act"]
    registry.get(model.activation)
    model.activation_order = config["activation_order"]
    model.activation_norm = config["activation_norm"]
    model.activation_eps = config["activation_eps"]
    model.activation_coefficients = config["activation_coefficients"]


def _set_experts(model: ModelConfig, config: Mapping[str, Any]) -> None:
    model.num_moe_experts = config["num_experts"]
    model.moe_ffn_hidden_size = config["intermediate_size"]
    model.moe_shared_expert_intermediate_size = config.get("shared_expert_intermediate_size")
    model.moe_router_topk = config["num_experts_per_tok"]
    model.moe_router_pre_softmax = not config.get("norm_topk_prob", False)
    scale = aux_loss_scale(config["model_type"], model.num_layers, model.moe_router_topk)
    coefficient = config.get("router_aux_loss_coef")
    # The default of OLMoE and of exports, if config.json does not set it.
    model.moe_aux_loss_coeff = _rounded((0.01 if coefficient is None else coefficient) / scale)
    if config.get("router_z_loss_coef") is not None:
        model.moe_z_loss_coeff = config["router_z_loss_coef"]
    elif config["model_type"] == "olmoe":
        model.moe_z_loss_coeff = 0.0  # transformers trains it without


def _set_library_activation(model: ModelConfig, config: Mapping[str, Any], source: str) -> None:
    """Set gated SiLU or GELU, or the activation that a released PolyCom checkpoint names."""
    named = _library_acts() | {name: name for name in _RELEASED_ACTS}
    act = str(config.get("hidden_act", _DEFAULT_ACT))
    key = act if act in named else act.replace("_", "").lower()
    if key not in named:
        raise CheckpointError(
            f"`hidden_act` in {source} must be one of {', '.join(named)}; it is {act}."
        )
    model.activation = named[key]


def _refuse_unsupported(config: Mapping[str, Any], source: str) -> None:
    found = {
        "attention_bias": config.get("attention_bias"),
        "mlp_bias": config.get("mlp_bias"),
        "clip_qkv": config.get("clip_qkv"),
        "quantization_config": config.get("quantization_config"),
    }
    if config.get("num_experts_per_tok") == 1 and config.get("norm_topk_prob"):
        # A probability divided by itself is one, so the router would learn nothing.
        found["norm_topk_prob, with num_experts_per_tok 1"] = True
    given = {name: value for name, value in found.items() if value not in (None, False)}
    given |= unsupported_positions(config, max_positions(config))
    if given:
        listed = ", ".join(f"`{name}`: {value}" for name, value in given.items())
        raise CheckpointError(
            f"{source} has {listed} and cannot be imported. Models here have no biases, no "
            "clipping of queries and keys and no quantized weights, attend to all earlier tokens "
            "with unscaled rotary positions on whole heads, and a single expert keeps its own "
            "probability."
        )
