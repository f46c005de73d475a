"""Values that follow from others: nulls filled, tokens turned into steps, sizes per rank.

Everything here expects a configuration that :mod:`megapoly.config.rules` has no complaint about.
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
    """A copy in which every null that stands for another value is that value.

    Lengths in tokens become lengths in steps and their token forms null, so that the result obeys
    "one of the two". Nulls that mean "none" stay (experts, recomputation, data, ``eval_iters``).
    The size of the job plays no part: one resolved file fits every job that the rules let run.

    Args:
        config: left as it is.
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
    """Kernels of Transformer Engine and apex, where these are used or installed."""
    model, training = config.model, config.training
    if model.apply_rope_fusion is None:
        model.apply_rope_fusion = model.transformer_engine
    if model.moe_permute_fusion is None and model.num_moe_experts is not None:
        model.moe_permute_fusion = model.transformer_engine
    if training.gradient_accumulation_fusion is None:
        training.gradient_accumulation_fusion = training.device == "cuda" and machine.apex


def without_gpu_kernels(config: Config) -> None:
    """Make a run's configuration one of CPU, in place; it computes the same, without FP8."""
    config.training.device = "cpu"
    model, training = config.model, config.training
    model.transformer_engine = model.apply_rope_fusion = False
    model.moe_permute_fusion = None if model.num_moe_experts is None else False
    training.gradient_accumulation_fusion = False
    without_fp8(training)


def without_fp8(training: TrainingConfig) -> None:
    """Leave FP8 and its options out, in place: the same weights, checkpoints and optimizer."""
    for name in FP8_OPTIONS:
        setattr(training, name, getattr(TrainingConfig(), name))


def num_query_groups(model: ModelConfig) -> int:
    """Key/value heads."""
    return model.num_query_groups or model.num_attention_heads


def kv_channels(model: ModelConfig) -> int:
    """Width of one head."""
    return model.kv_channels or model.hidden_size // model.num_attention_heads


def moe_ffn_hidden_size(model: ModelConfig) -> int:
    """Width of one expert before the two thirds of a gated activation."""
    return model.moe_ffn_hidden_size or model.ffn_hidden_size


def takes_two_thirds(model: ModelConfig) -> bool:
    """Whether FFN widths are scaled because the activation is gated.

    Raises:
        ConfigError: the activation is unknown.
    """
    # Here and not above: the registry brings torch, which reading a configuration does not need.
    from megapoly.activations import registry

    return registry.get(model.activation).gated and model.scale_gated_ffn


def ffn_width(model: ModelConfig, size: int) -> int:
    """Columns that the activation sees: ``size``, or two thirds of it where that is scaled.

    Args:
        model: tells the activation and ``scale_gated_ffn``.
        size: one of the FFN widths of ``model`` (dense, expert or shared expert).

    Raises:
        ConfigError: the activation is unknown.
    """
    return size * 2 // 3 if takes_two_thirds(model) else size


def padded_vocab_size(config: Config) -> int:
    """Rows of the embedding: ``vocab_size`` up to the next size that divides as it has to.

    That is a multiple of ``make_vocab_size_divisible_by`` and of the tensor-parallel size. The rows
    from ``vocab_size`` on are no part of the model: a checkpoint fits every other padding.
    """
    model = config.model
    assert model.vocab_size is not None, "resolve first"
    multiple = math.lcm(
        model.make_vocab_size_divisible_by, config.parallel.tensor_model_parallel_size
    )
    return -(-model.vocab_size // multiple) * multiple


def expert_tensor_parallel_size(parallel: ParallelConfig) -> int:
    """Ranks that share one expert's matrices."""
    return parallel.expert_tensor_parallel_size or parallel.tensor_model_parallel_size


def uses_sequence_parallel(parallel: ParallelConfig) -> bool:
    """Whether activations are cut along the sequence outside the matrix products."""
    if parallel.sequence_parallel is None:
        return parallel.tensor_model_parallel_size > 1
    return parallel.sequence_parallel


def sequence_parts(parallel: ParallelConfig) -> int:
    """Ranks that share each sequence's activations outside the matrix products."""
    return parallel.tensor_model_parallel_size if uses_sequence_parallel(parallel) else 1


def uses_transformer_engine(model: ModelConfig, device: str, machine: Machine) -> bool:
    """Whether layers come from Transformer Engine: as set, or on CUDA where it is installed."""
    if model.transformer_engine is None:
        return device == "cuda" and machine.transformer_engine
    return model.transformer_engine


CPCommType = Literal["p2p", "all_gather", "a2a"]


def cp_comm_type(config: Config) -> CPCommType | None:
    """How ranks that share a sequence attend to all of it; None where none share one."""
    if config.parallel.context_parallel_size == 1:
        return None
    default: CPCommType = "p2p" if config.model.transformer_engine else "all_gather"
    return config.parallel.cp_comm_type or default


def data_parallel_size(config: Config, world_size: int) -> int:
    """Model replicas that share a global batch."""
    parallel = config.parallel
    return world_size // (
        parallel.tensor_model_parallel_size
        * parallel.pipeline_model_parallel_size
        * parallel.context_parallel_size
    )


def least_world_size(config: Config) -> int:
    """Ranks of the smallest job that has the layout."""
    parallel, pipeline = config.parallel, config.parallel.pipeline_model_parallel_size
    return math.lcm(
        parallel.tensor_model_parallel_size * pipeline * parallel.context_parallel_size,
        expert_tensor_parallel_size(parallel) * parallel.expert_model_parallel_size * pipeline,
    )


def num_microbatches(config: Config, world_size: int) -> int:
    """Forward passes of one rank in one step."""
    training = config.training
    return training.global_batch_size // (
        training.micro_batch_size * data_parallel_size(config, world_size)
    )


def tokens_per_step(config: Config) -> int:
    """Tokens that one optimizer step trains on."""
    return config.training.global_batch_size * config.training.seq_length


def train_iters(config: Config) -> int:
    """Steps of the run; a length in tokens is rounded up."""
    training = config.training
    if training.train_tokens is None:
        assert training.train_iters is not None, "a checked configuration has one of the two"
        return training.train_iters
    return -(-training.train_tokens // tokens_per_step(config))


def lr_warmup_iters(config: Config) -> int:
    """Steps of warm-up, 0 if none is given."""
    optimizer = config.optimizer
    steps = _nearest_steps(config, optimizer.lr_warmup_iters, optimizer.lr_warmup_tokens)
    return steps or 0


def lr_decay_iters(config: Config) -> int:
    """Steps until the lowest learning rate, warm-up included.

    If none are given: the whole run, or just past the warm-up in a run that ends within it.
    """
    optimizer = config.optimizer
    steps = _nearest_steps(config, optimizer.lr_decay_iters, optimizer.lr_decay_tokens)
    return max(train_iters(config), lr_warmup_iters(config) + 1) if steps is None else steps


def lr_wsd_decay_iters(config: Config) -> int | None:
    """Steps of the decay that ends the WSD schedule; None if no length is given."""
    optimizer: OptimizerConfig = config.optimizer
    return _nearest_steps(config, optimizer.lr_wsd_decay_iters, optimizer.lr_wsd_decay_tokens)


def _nearest_steps(config: Config, steps: int | None, tokens: int | None) -> int | None:
    """``steps``, or ``tokens`` in steps, rounded to the nearest."""
    if tokens is None:
        return steps
    step = tokens_per_step(config)
    return (tokens + step // 2) // step
