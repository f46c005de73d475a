"""Results of the paper, and a model and its training in the paper's terms.

Source: PolyCom (ICLR 2025), Tables 1 and 2, Fig. 1 and 3; values read from a curve are marked.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megapoly.config import load_yaml
from megapoly.config.parsing import to_dict
from megapoly.config.resolve import resolve
from megapoly.platform.machine import Machine
from megapoly.study.report.runs import source_name


@dataclass(frozen=True)
class PaperResults:
    """Results of the paper for one kind of model.

    Args:
        models: size and training tokens.
        training_loss: at the end, by activation.
        perplexity: of validation, as printed, by activation.
        validation_loss: mean of eleven sets, by activation.
        reach: share of the tokens after which SwiGLU's final training loss is reached; read from
            the curves.
        hardware: on which it was trained.
        results: source of the numbers.
    """

    models: str
    training_loss: Mapping[str, float]
    perplexity: Mapping[str, float]
    validation_loss: Mapping[str, float]
    reach: Mapping[str, float]
    hardware: str
    results: str


DENSE = PaperResults(
    models="1.3B, 250B tokens",
    # Table 1 has two digits, the curves of Fig. 1 three.
    training_loss={
        "swiglu": 2.191,
        "gelu": 2.209,
        "relu": 2.216,
        "polyrelu": 2.179,
        "polynorm": 2.172,
    },
    perplexity={"swiglu": 3.22, "gelu": 3.24, "relu": 3.26, "polyrelu": 3.18, "polynorm": 3.17},
    validation_loss={},
    reach={"polyrelu": 204 / 245, "polynorm": 187 / 245},
    hardware="32 x A100-80G",
    results="training loss at 245B of 250B tokens, read from Fig. 1; perplexity as in Table 1",
)
MOE = PaperResults(
    models="6.9B, 1.3B active, 200B tokens",
    training_loss={},
    perplexity={},
    validation_loss={"swiglu": 2.41, "polynorm": 2.39},
    reach={},
    hardware="64 x A100-80G",
    results="mean validation loss of Table 2; the gap in training loss, read from Fig. 3, is 0.014",
)
RECIPES = {False: "dense_1b_paper.yaml", True: "moe_7b_paper.yaml"}


def results(moe: bool) -> PaperResults:
    """Return the paper's results for dense models or for mixtures of experts."""
    return MOE if moe else DENSE


def recipe(folder: Path, moe: bool) -> dict[str, Any]:
    """Return the paper's configuration, resolved, in the form that :func:`facts` takes.

    Args:
        folder: with the recipes.
        moe: the mixture of experts; false: the dense model.
    """
    from megapoly.preflight.planning.parameters import active_parameters, total_parameters

    config = load_yaml(folder / RECIPES[moe])
    assert config.model.vocab_size is not None
    machine = Machine(cuda=True, compute_capability=(8, 0), transformer_engine=True, apex=True)
    config = resolve(config, tokenizer_vocab_size=config.model.vocab_size, machine=machine)
    counts = {"parameters": total_parameters(config), "active": active_parameters(config)}
    return {**to_dict(config), **counts}


def facts(config: Mapping[str, Any], parameters: int, active: int) -> dict[str, str]:
    """Describe a model, its data and its training, in the same rows for a run and the paper.

    Args:
        config: resolved, as plain values.
        parameters: of the model.
        active: those that one token uses.
    """
    model, optimizer, training = config["model"], config["optimizer"], config["training"]
    step = training["global_batch_size"] * training["seq_length"]
    tokens = step * training["train_iters"]
    experts = model["num_moe_experts"]
    size = f"{parameters:,}" + (f", {active:,} active" if experts else "")
    heads = f"{model['num_attention_heads']} heads"
    width = model["ffn_hidden_size"]
    ffn = f"{width:,}, gated {width * 2 // 3:,}"
    if experts:
        width = model["moe_ffn_hidden_size"]
        ffn = f"{experts} experts, top-{model['moe_router_topk']}, {width:,}, gated "
        ffn += f"{width * 2 // 3:,}"
    floor = optimizer["min_lr"] / optimizer["lr"]
    return {
        "parameters": size,
        "layers, width": f"{model['num_layers']}, {model['hidden_size']:,}, {heads}",
        "FFN": ffn,
        **_parts(model),
        "vocabulary": f"{model['vocab_size']:,}",
        "context": f"{training['seq_length']:,} tokens",
        "batch": f"{training['global_batch_size']:,} sequences, {step:,} tokens",
        "training tokens": f"{short(tokens)}, {tokens / parameters:.1f} per parameter",
        "learning rate": f"{optimizer['lr']:g}",
        "its decay": f"{optimizer['lr_decay_style']}, to {floor:.3g} of it",
        "warm-up": f"{optimizer['lr_warmup_iters']:,} of {training['train_iters']:,} steps",
        "AdamW": f"betas {optimizer['adam_beta1']:g}, {optimizer['adam_beta2']:g}, weight decay "
        f"{optimizer['weight_decay']:g}, clip {optimizer['clip_grad']:g}",
        "initial weights": _initial(model),
        "precision": _precision(training),
        "training data": ", ".join(source_name(s) for s in config["data"]["blend"] or [])
        or "built-in books",
        "validation sets": ", ".join(config["data"]["validation"] or {}) or "built-in books",
    }


def short(count: float) -> str:
    """Format a count with three digits and K, M, B or T."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return f"{count:.3g}"


def _parts(model: Mapping[str, Any]) -> dict[str, str]:
    """Describe attention, embeddings, dropout and, of a mixture, shared expert and router."""
    groups = model["num_query_groups"] or model["num_attention_heads"]
    norm = "" if model["qk_norm"] == "none" else f", QK-norm ({model['qk_norm']})"
    parts = {
        "attention": f"{groups} key/value heads, RoPE theta {model['rotary_base']:,}{norm}",
        "embeddings": "untied" if model["untie_embeddings_and_output_weights"] else "tied",
        "dropout": f"{model['hidden_dropout']:g}, attention {model['attention_dropout']:g}",
    }
    if model["num_moe_experts"]:
        shared = model["moe_shared_expert_intermediate_size"]
        parts["shared expert"] = f"{shared:,}" if shared else "none"
        parts["router"] = (
            f"softmax {'before' if model['moe_router_pre_softmax'] else 'over'} the top-k, "
            f"balancing {model['moe_aux_loss_coeff']:g}, z-loss {model['moe_z_loss_coeff']:g}"
        )
    return parts


def _initial(model: Mapping[str, Any]) -> str:
    text = f"{model['init_method'].replace('_', ' ')}, std {model['init_method_std']:g}"
    return text + (", residual outputs by depth" if model["scale_residual_init"] else "")


def _precision(training: Mapping[str, Any]) -> str:
    if training["fp8"]:
        return f"FP8 ({training['fp8']}), bf16"
    return "bf16" if training["bf16"] else "fp32"
