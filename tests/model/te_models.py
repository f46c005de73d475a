"""Models of Transformer Engine's layers, and the same models of local layers.

What tests compare: on CPU with Transformer Engine's kernels written in torch (``te_kernels.py``),
and on a GPU with the real ones.
"""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import torch
from layouts import Result, _agreed, random_batches, result_of_model, small_config
from megatron.core.transformer.moe.moe_utils import get_moe_layer_wise_logging_tracker

from megapoly.config import Config
from megapoly.model.builder import gpt_model, unwrap
from megapoly.model.shards import checkpoint_metadata, shards_of
from megapoly.model.transformer_config import transformer_config
from megapoly.platform.device import Platform
from megapoly.preflight.parallel_check.whole_model import weight_shards
from megapoly.training.load_checkpoint import load_checkpoint
from megapoly.training.save_checkpoint import CheckpointSaver
from megapoly.training.state import TrainState, build_state
from megapoly.training.step import compute_gradients, train_step, update_parameters

# Divisible as every FP8 recipe wants them.
SIZES = {"model.ffn_hidden_size": 64, "training.seq_length": 32}
EXPERTS = {
    "model.num_moe_experts": 4,
    "model.moe_router_topk": 2,
    "model.ffn_hidden_size": 64,
    "training.seq_length": 32,
    "model.moe_permute_fusion": False,
}
SHARED = {"model.moe_shared_expert_intermediate_size": 32}
MODELS: dict[str, dict[str, Any]] = {
    "dense": SIZES,
    "tied": SIZES | {"model.untie_embeddings_and_output_weights": False},
    "gated": SIZES | {"model.activation": "gated_polynorm", "model.ffn_hidden_size": 96},
    "head norm": SIZES | {"model.qk_norm": "head"},
    "experts": EXPERTS,
    "fused permutation": EXPERTS | {"model.moe_permute_fusion": True},
    "one after another": EXPERTS | {"model.moe_grouped_gemm": False},
    "coefficients of experts": EXPERTS | {"model.activation_coefficients": "per_expert"},
    "shared expert, full norm": EXPERTS | SHARED | {"model.qk_norm": "full"},
}
LOCAL = {"model.transformer_engine": False}
FUSIONS = ("model.apply_rope_fusion", "model.moe_permute_fusion")
BF16 = {"training.bf16": True}


def fp8(recipe: str) -> dict[str, Any]:
    """Options of FP8."""
    return BF16 | {"training.fp8": "hybrid", "training.fp8_recipe": recipe}


def config_of(options: dict[str, Any], platform: Platform, *, local: bool = False) -> Config:
    """A small model of Transformer Engine's layers, or the same of local ones."""
    options = options | {"training.device": platform.device.type}
    if local:
        options = {k: v for k, v in options.items() if k not in FUSIONS} | LOCAL
    return small_config({"model.transformer_engine": True} | options)


def first_step(config: Config, platform: Platform) -> Result:
    """Weights, gradients, losses and gradient norm of the first step, on one process."""
    rank = result_of_model(config, platform)
    for part in (*rank.weights, *rank.gradients):
        part.data = part.data.cpu()
    return Result([rank])


def differences(actual: Result, expected: Result) -> dict[str, float]:
    """How far two first steps are apart: weights to the bit, gradients by norm, losses."""
    assert actual.weights.keys() == expected.weights.keys()
    weights = [torch.equal(actual.weights[k], v) for k, v in expected.weights.items()]
    apart = {k: (actual.gradients[k] - v).norm().item() for k, v in expected.gradients.items()}
    sizes = {k: v.norm().item() for k, v in expected.gradients.items()}
    losses = zip(actual.ranks[0].losses, expected.ranks[0].losses, strict=True)
    return {
        "other weights": float(weights.count(False)),
        "gradients": (sum(d * d for d in apart.values()) / sum(s * s for s in sizes.values()))
        ** 0.5,
        "worst gradient": max(apart[k] / max(sizes[k], 1e-30) for k in apart),
        "losses": max(abs(a - b) for a, b in losses),
        "gradient norm": abs(actual.ranks[0].grad_norm / expected.ranks[0].grad_norm - 1),
    }


@dataclasses.dataclass
class Description:
    """What a model is made of."""

    modules: dict[str, str]  # name of the module to its class
    shapes: dict[str, tuple[int, ...]]  # name of a checkpoint's tensor to its shape
    marks: dict[str, dict[str, Any]]  # of parameters, by a checkpoint's tensor
    num_parameters: int


MARKS = ("sequence_parallel", "allreduce", "tensor_model_parallel")


def description(config: Config) -> Description:
    """Of a model on CPU whose weights are not set; process groups must exist."""
    gpt = gpt_model(config, transformer_config(config, on_cpu=True))
    entries = gpt.sharded_state_dict(metadata=checkpoint_metadata()).values()
    tensors = [entry for entry in entries if isinstance(entry.data, torch.Tensor)]
    tensors = [entry for entry in tensors if "_extra_state" not in entry.key]
    return Description(
        {name: f"{type(m).__module__}.{type(m).__name__}" for name, m in gpt.named_modules()},
        {part.key: tuple(part.global_shape) for entry in tensors for part in shards_of(entry)},
        {entry.key: {mark: getattr(entry.data, mark, None) for mark in MARKS} for entry in tensors},
        sum(parameter.numel() for parameter in gpt.parameters()),
    )


def losses_of_steps(state: TrainState, steps: int) -> list[float]:
    """Of steps on one and the same batch."""
    result = []
    for _ in range(steps):
        get_moe_layer_wise_logging_tracker().clear()  # as long as the last model's layers
        batches = random_batches(state.config, state.layout)
        result.append(train_step(state, batches).lm_loss)
    return result


def trained(config: Config, platform: Platform, steps: int) -> list[float]:
    """Losses of a model from its start."""
    return losses_of_steps(build_state(config, platform, CORPUS), steps)


CORPUS = SimpleNamespace(fingerprint="random", description={})


def weights_of(state: TrainState) -> dict[str, torch.Tensor]:
    """Weights of a model on a single rank, by their names in a checkpoint."""
    parts = weight_shards(state.chunks)
    return _agreed(dataclasses.replace(part, data=part.data.cpu()) for part in parts)


def there_and_back(options: dict[str, Any], platform: Platform, folder: Any) -> dict[str, Any]:
    """Compare a run that changes its layers at two checkpoints with one that never does.

    Returns:
        Losses of three steps of each, and whether the second's weights and those that the first
        loaded were the same at both changes.
    """
    options = options | {"training.train_iters": 4, "optimizer.lr_decay_style": "constant"}
    kinds = {
        "local": config_of(options, platform, local=True),
        "transformer engine": config_of(options, platform),
    }
    whole = build_state(kinds["local"], platform, CORPUS)
    losses, same = [], []
    last = path = None
    for kind in ("local", "transformer engine", "local"):
        config = kinds[kind]
        config.run_dir = str(folder)
        state = build_state(config, platform, CORPUS)
        if last is not None:
            load_checkpoint(state, path)
            after = weights_of(state)
            same.append(all(torch.equal(after[k], v) for k, v in weights_of(last).items()))
        losses += losses_of_steps(state, 1)
        path, last = CheckpointSaver(state).save(in_background=False), state
    return {"losses": losses, "whole": losses_of_steps(whole, 3), "same": same}


def history_of_scales(platform: Platform, folder: Any) -> dict[str, Any]:
    """A run in FP8 with delayed scaling that resumes from a checkpoint, and one that does not.

    Returns:
        Losses of the second step of both, of one that has only the weights, and how many modules
        have a history that is the same to the bit in the first two.
    """
    options = MODELS["experts"] | fp8("delayed") | {"training.train_iters": 3}
    config = config_of(options | {"training.fp8_amax_history_len": 4}, platform)
    config.run_dir = str(folder)
    whole, resumed = (build_state(config, platform, CORPUS) for _ in range(2))
    losses_of_steps(whole, 1)
    load_checkpoint(resumed, CheckpointSaver(whole).save(in_background=False))
    histories = [_histories(state) for state in (whole, resumed)]
    same = [torch.equal(histories[1][name], history) for name, history in histories[0].items()]
    return {
        "losses": [losses_of_steps(state, 1)[0] for state in (whole, resumed)],
        "same": same,
        "largest": max(history.max().item() for history in histories[0].values()),
    }


def _histories(state: TrainState) -> dict[str, torch.Tensor]:
    modules = unwrap(state.chunks[0]).named_modules()
    # Attention, which has no weights, is in bf16.
    with_weights = ((n, m) for n, m in modules if any(True for _ in m.parameters(recurse=False)))
    metadata = {name: getattr(module, "fp8_meta", {}) for name, module in with_weights}
    return {
        name: each["scaling_fwd"].amax_history.cpu().clone()
        for name, each in metadata.items()
        if "scaling_fwd" in each
    }


def gradients_with_rows_of(align: int, config: Config, platform: Platform) -> dict[str, Any]:
    """Gradients of the first step, the rows of each expert filled up to a multiple of ``align``."""
    get_moe_layer_wise_logging_tracker().clear()
    state = build_state(config, platform, CORPUS)
    for module in unwrap(state.chunks[0]).modules():
        if hasattr(module, "align_size"):
            module.align_size = align
    losses = compute_gradients(state, random_batches(config, state.layout))
    gradients = {
        name: parameter.main_grad.cpu().clone()
        for name, parameter in unwrap(state.chunks[0]).named_parameters()
    }
    update_parameters(state, losses)
    return gradients
