"""Values that follow from others: nulls resolved, tokens converted to steps, sizes per rank.

Everything here expects a configuration that breaks no rule of :mod:`megapoly.config.rules`.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Literal

from megapoly.config.data_sources import blend_sources
from megapoly.config.fp8 import FP8_OPTIONS
from megapoly.config.schema import (
    BlendSource,
    Config,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    TrainingConfig,
)
from megapoly.platform.machine import Machine


def resolve(
    config: Config,
    *,
    tokenizer_vocab_size: int,
    machine: Machine,
) -> Config:
    """Return a copy in which every null that means another value is replaced by it.

    Lengths in tokens become lengths in steps and their token forms null, so that the result obeys
    "one of the two". Nulls that mean "none" stay (experts, recomputation, data, ``eval_iters``).
    The result does not depend on the size of the job: one resolved file fits every job that the
    rules allow.

    Args:
        config: not changed.
        tokenizer_vocab_size: ids of the tokenizer, special ones included.
        machine: what every process has.

    Returns:
        The resolved configuration; resolving it again changes nothing.
    """
    resolved = copy.deepcopy(config)
    _resolve_model(resolved.model, tokenizer_vocab_size)
    parallel = resolved.parallel
    parallel.expert_tensor_parallel_size = expert_tensor_parallel_size(parallel)
    parallel.sequence_parallel = uses_sequence_parallel(parallel)
    _resolve_schedule(resolved)
    if resolved.training.device == "auto":
        resolved.training.device = "cuda" if machine.cuda else "cpu"
    resolved.model.transformer_engine = uses_transformer_engine(
        resolved.model, resolved.training.device, machine
    )
    _resolve_fusions(resolved, machine)
    parallel.cp_comm_type = cp_comm_type(resolved)
    if resolved.training.calculate_per_token_loss is None:
        resolved.training.calculate_per_token_loss = resolved.data.eod_mask_loss
    resolved.data.blend = _with_names(resolved)
    if resolved.data.cache_dir is None:
        resolved.data.cache_dir = str(Path(resolved.run_dir) / "cache")
    return resolved


def _with_names(config: Config) -> list[str | BlendSource] | None:
    sources = blend_sources(config.data)
    return None if sources is None else [*sources]


def _resolve_model(model: ModelConfig, tokenizer_vocab_size: int) -> None:
    model.num_query_groups = num_query_groups(model)
    model.kv_channels = kv_channels(model)
    if model.vocab_size is None:
        model.vocab_size = tokenizer_vocab_size
    if model.num_moe_experts is not None:
        model.moe_ffn_hidden_size = moe_ffn_hidden_size(model)


def _resolve_schedule(config: Config) -> None:
    training, optimizer = config.training, config.optimizer
    total, warmup = train_iters(config), lr_warmup_iters(config)
    decay, wsd_decay = lr_decay_iters(config), lr_wsd_decay_iters(config)
    training.train_iters, training.train_tokens = total, None
    optimizer.lr_warmup_iters, optimizer.lr_warmup_tokens = warmup, None
    optimizer.lr_decay_iters, optimizer.lr_decay_tokens = decay, None
    optimizer.lr_wsd_decay_iters, optimizer.lr_wsd_decay_tokens = wsd_decay, None


def _resolve_fusions(config: Config, machine: Machine) -> None:
    """Enable kernels of Transformer Engine and apex where these are used or installed."""
    model, training = config.model, config.training
    if model.apply_rope_fusion is None:
        model.apply_rope_fusion = model.transformer_engine
    if model.moe_permute_fusion is None and model.num_moe_experts is not None:
        model.moe_permute_fusion = model.transformer_engine
    if training.gradient_accumulation_fusion is None:
        training.gradient_accumulation_fusion = training.device == "cuda" and machine.apex


def without_gpu_kernels(config: Config) -> None:
    """Change a configuration to run on CPU, in place; it computes the same, without FP8."""
    config.training.device = "cpu"
    model, training = config.model, config.training
    model.transformer_engine = model.apply_rope_fusion = False
    model.moe_permute_fusion = None if model.num_moe_experts is None else False
    training.gradient_accumulation_fusion = False
    without_fp8(training)


def without_fp8(training: TrainingConfig) -> None:
    """Disable FP8, in place; weights, checkpoints and optimizer stay the same."""
    for name in FP8_OPTIONS:
        setattr(training, name, getattr(TrainingConfig(), name))


def num_query_groups(model: ModelConfig) -> int:
    """Return the number of key/value heads."""
    return model.num_query_groups or model.num_attention_heads


def kv_channels(model: ModelConfig) -> int:
    """Return the width of one head."""
    return model.kv_channels or model.hidden_size // model.num_attention_heads


def moe_ffn_hidden_size(model: ModelConfig) -> int:
    """Return the width of one expert before the two thirds of a gated activation."""
    return model.moe_ffn_hidden_size or model.ffn_hidden_size


def takes_two_thirds(model: ModelConfig) -> bool:
    """Return whether FFN widths are scaled because the activation is gated.

    Raises:
        ConfigError: the activation is unknown.
    """
    # Here, not above: the registry imports torch, which reading a configuration does not need.
    from megapoly.activations import registry

    return registry.get(model.activation).gated and model.scale_gated_ffn


def ffn_width(model: ModelConfig, size: int) -> int:
    """Return the width of the activation: ``size``, or two thirds of it if scaled.

    Args:
        model: has the activation and ``scale_gated_ffn``.
        size: one of the FFN widths of ``model`` (dense, expert or shared expert).

    Raises:
        ConfigError: the activation is unknown.
    """
    return size * 2 // 3 if takes_two_thirds(model) else size


def padded_vocab_size(config: Config) -> int:
    """Return the rows of the embedding: ``vocab_size`` with padding.

    The result is a multiple of ``make_vocab_size_divisible_by`` and of the tensor-parallel size.
    Rows from ``vocab_size`` on are not part of the model: a checkpoint fits every padding.
    """
    model = config.model
    assert model.vocab_size is not None, "resolve first"
    multiple = math.lcm(
        model.make_vocab_size_divisible_by, config.parallel.tensor_model_parallel_size
    )
    return -(-model.vocab_size // multiple) * multiple


def expert_tensor_parallel_size(parallel: ParallelConfig) -> int:
    """Return the number of ranks that share one expert's matrices."""
    return parallel.expert_tensor_parallel_size or parallel.tensor_model_parallel_size


def uses_sequence_parallel(parallel: ParallelConfig) -> bool:
    """Return whether activations are split along the sequence outside the matrix products."""
    if parallel.sequence_parallel is None:
        return parallel.tensor_model_parallel_size > 1
    return parallel.sequence_parallel


def sequence_parts(parallel: ParallelConfig) -> int:
    """Return how many ranks share each sequence's activations outside the matrix products."""
    return parallel.tensor_model_parallel_size if uses_sequence_parallel(parallel) else 1


def uses_transformer_engine(model: ModelConfig, device: str, machine: Machine) -> bool:
    """Return whether layers are Transformer Engine's: as set, or on CUDA if it is installed."""
    if model.transformer_engine is None:
        return device == "cuda" and machine.transformer_engine
    return model.transformer_engine


CPCommType = Literal["p2p", "all_gather", "a2a"]


def cp_comm_type(config: Config) -> CPCommType | None:
    """Return how ranks that share a sequence attend to all of it; None if none share one."""
    if config.parallel.context_parallel_size == 1:
        return None
    default: CPCommType = "p2p" if config.model.transformer_engine else "all_gather"
    return config.parallel.cp_comm_type or default


def data_parallel_size(config: Config, world_size: int) -> int:
    """Return the number of model replicas that share a global batch."""
    parallel = config.parallel
    return world_size // (
        parallel.tensor_model_parallel_size
        * parallel.pipeline_model_parallel_size
        * parallel.context_parallel_size
    )


def least_world_size(config: Config) -> int:
    """Return the number of ranks of the smallest job that has the layout."""
    parallel, pipeline = config.parallel, config.parallel.pipeline_model_parallel_size
    return math.lcm(
        parallel.tensor_model_parallel_size * pipeline * parallel.context_parallel_size,
        expert_tensor_parallel_size(parallel) * parallel.expert_model_parallel_size * pipeline,
    )


def num_microbatches(config: Config, world_size: int) -> int:
    """Return the number of forward passes of one rank in one step."""
    training = config.training
    return training.global_batch_size // (
        training.micro_batch_size * data_parallel_size(config, world_size)
    )


def tokens_per_step(config: Config) -> int:
    """Return the number of tokens of one optimizer step."""
    return config.training.global_batch_size * config.training.seq_length


def train_iters(config: Config) -> int:
    """Return the number of steps of the run; a length in tokens is rounded up."""
    training = config.training
    if training.train_tokens is None:
        assert training.train_iters is not None, "a checked configuration has one of the two"
        return training.train_iters
    return -(-training.train_tokens // tokens_per_step(config))


def lr_warmup_iters(config: Config) -> int:
    """Return the number of steps of warm-up, 0 if none is given."""
    optimizer = config.optimizer
    steps = _nearest_steps(config, optimizer.lr_warmup_iters, optimizer.lr_warmup_tokens)
    return steps or 0


def lr_decay_iters(config: Config) -> int:
    """Return the number of steps until the lowest learning rate, warm-up included.

    If none is given: the whole run, or just past the warm-up in a run that ends within it.
    """
    optimizer = config.optimizer
    steps = _nearest_steps(config, optimizer.lr_decay_iters, optimizer.lr_decay_tokens)
    return max(train_iters(config), lr_warmup_iters(config) + 1) if steps is None else steps


def lr_wsd_decay_iters(config: Config) -> int | None:
    """Return the number of steps of the decay that ends WSD; None if no length is given."""
    optimizer: OptimizerConfig = config.optimizer
    return _nearest_steps(config, optimizer.lr_wsd_decay_iters, optimizer.lr_wsd_decay_tokens)


def _nearest_steps(config: Config, steps: int | None, tokens: int | None) -> int | None:
    """Return ``steps``, or ``tokens`` converted to steps, rounded to the nearest."""
    if tokens is None:
        return steps
    step = tokens_per_step(config)
    return (tokens + step // 2) // step
