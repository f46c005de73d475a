"""A small copy of a configuration that a laptop's CPU can train at every layout."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

from megapoly.activations import registry
from megapoly.config import Config
from megapoly.config.resolve import num_query_groups, resolve, without_gpu_kernels
from megapoly.config.schema import ModelConfig, OptimizerConfig, TrainingConfig
from megapoly.data.tokenizer import load_tokenizer
from megapoly.errors import ConfigError
from megapoly.platform.machine import CPU
from megapoly.preflight.layouts import Layout, all_layouts

WORLD_SIZES = [1, 2, 4, 8]
_HEAD_WIDTH = 8
# A wrong update changes the next gradients by about 1e-3. Where a gradient is almost zero, Adam
# turns its rounding errors into full steps: at a rate of 2e-3 this alone was 2e-5 after 3 steps.
_LEARNING_RATE = 1e-4
_SEQ_LENGTH = 64
_GLOBAL_BATCH_SIZE = 8
# More stages and chunks only repeat what fewer do, and cost a layer each.
_MOST_CHUNKS = 6


def scaled_down(
    config: Config, *, steps: int, bf16: bool, layouts: Sequence[Layout] | None = None
) -> Config:
    """Return a small model of the same kind, for one process and the built-in text.

    Every option is the configuration's, except sizes and the following. A size is the smallest
    that the layouts divide exactly if they divide the configuration's. Ratios are kept: query heads
    to key/value heads, experts to those of a token (at least 2, unless the configuration has 1).
    Initial weights grow as the width shrinks, so that activations keep their size. The batch has as
    many sequences, and these are as long, as the layouts need. The learning rate is 1e-4 from the
    first step on. Dropout is disabled, since its random numbers differ between layouts, and
    activations are not compiled. Evaluation, checkpoints and logs are left out.

    Args:
        config: resolved or not; not changed.
        steps: number of training steps.
        bf16: compute in bfloat16; false: fp32.
        layouts: layouts that the copy is for; None: those of 1, 2, 4 and 8 processes.

    Returns:
        The resolved configuration, for one process.

    Raises:
        ConfigError: it trains in FP8, or its activation is unknown.
    """
    if config.training.fp8 is not None:
        raise ConfigError(
            [
                f"`training.fp8` ({config.training.fp8}) cannot be checked here: FP8 products need "
                "a GPU and Transformer Engine; add `--training.fp8 null` to check the rest of the "
                "configuration"
            ]
        )
    if layouts is None:
        layouts = candidates(config, WORLD_SIZES)
    small = Layout().applied_to(config)
    vocab_size = load_tokenizer(None).vocab_size
    _scale_model(small.model, vocab_size, layouts)
    _reset(small.data, ["blend", "validation", "tokenizer", "cache_dir", "num_workers"])
    small.logging = type(small.logging)(tensorboard=False)
    small.checkpoint = type(small.checkpoint)(save=False)
    _scale_training(small.training, layouts)
    small.training.train_iters, small.training.bf16 = steps, bf16
    _constant_learning_rate(small.optimizer)
    if small.parallel.recompute_num_layers is not None:
        small.parallel.recompute_num_layers = 1  # the shortest stage of any layout has one layer
    without_gpu_kernels(small)
    return resolve(small, tokenizer_vocab_size=vocab_size, machine=CPU)


def candidates(config: Config, world_sizes: Iterable[int]) -> list[Layout]:
    """Return every layout of these numbers of processes, whether or not the rules allow it.

    A pipeline has at most 6 chunks, so that the copy needs no more layers.
    """
    num_experts = config.model.num_moe_experts
    return [
        layout
        for world_size in world_sizes
        for layout in all_layouts(world_size, num_experts=num_experts, is_allowed=_has_few_chunks)
    ]


def left_out(config: Config) -> list[str]:
    """Return a sentence for each option that the check does not cover."""
    model, found = config.model, []
    for name in ("hidden_dropout", "attention_dropout"):
        if value := getattr(model, name):
            found.append(
                f"`model.{name}` ({value}) is not checked: dropout draws other numbers at every "
                "layout, so the copy has none"
            )
    return found


def _has_few_chunks(layout: Layout) -> bool:
    return _num_chunks(layout) <= _MOST_CHUNKS


def _num_chunks(layout: Layout) -> int:
    """Return the parts into which the layers are split."""
    return layout.pipeline_model_parallel_size * layout.virtual_pipeline_model_parallel_size


def _like(size: int, smallest: int, divisor: int, *, ratio: int = 1) -> int:
    """Return the least n, ``ratio * n`` from ``smallest`` on, that shares ``size``'s divisors.

    These are the common divisors with ``divisor``. Never more than ``size``.
    """
    common = math.gcd(size, divisor)
    if common < 1:
        return size  # a size below 1, which a rule refuses
    n = -(-smallest // (ratio * common)) * common
    while math.gcd(n, divisor) != common:
        n += common
    return min(size, n)


def _scale_model(model: ModelConfig, builtin_vocab_size: int, layouts: Sequence[Layout]) -> None:
    width = model.hidden_size
    chunks = math.lcm(*map(_num_chunks, layouts))
    model.num_layers = _like(model.num_layers, 4, chunks)
    _scale_heads(model, layouts)
    model.kv_channels, model.max_position_embeddings = _HEAD_WIDTH, None
    model.hidden_size = _HEAD_WIDTH * model.num_attention_heads
    if model.hidden_size > 0 < width:  # otherwise a rule refuses it
        model.init_method_std *= (width / model.hidden_size) ** 0.5
    # Gated activations take two thirds, and rows that are summed in a fixed order have 8 segments.
    parts = math.lcm(
        24, *(3 * n for x in layouts for n in (x.tensor_model_parallel_size, x.expert_tensor_size))
    )
    widths = ["moe_ffn_hidden_size", "moe_shared_expert_intermediate_size"]
    if model.moe_ffn_hidden_size is None:  # otherwise that is the width of the experts
        widths.append("ffn_hidden_size")
    for name in widths:
        if getattr(model, name) is not None:
            setattr(model, name, _like(getattr(model, name), 48, parts))
    given = model.vocab_size or builtin_vocab_size
    # At least the built-in tokenizer's, also if the configuration's vocabulary is smaller.
    model.vocab_size = builtin_vocab_size + (given - builtin_vocab_size) % 8
    _scale_experts(model, layouts)
    model.hidden_dropout = model.attention_dropout = 0.0
    has_coefficients = registry.get(model.activation).has_coefficients
    model.activation_backend = "reference" if has_coefficients else ModelConfig().activation_backend


def _scale_heads(model: ModelConfig, layouts: Sequence[Layout]) -> None:
    """Scale key/value heads, and query heads with them."""
    heads, groups = model.num_attention_heads, num_query_groups(model)
    if groups < 1 or heads % groups:
        return  # a rule refuses it, with these sizes
    parts = math.lcm(
        *(
            x.tensor_model_parallel_size * (x.context_parallel_size if "a2a" in x.forms else 1)
            for x in layouts
        )
    )
    ratio = heads // groups
    groups = _like(groups, 8, parts, ratio=ratio)
    model.num_attention_heads = ratio * groups
    model.num_query_groups = None if ratio == 1 else groups


def _scale_experts(model: ModelConfig, layouts: Sequence[Layout]) -> None:
    experts, topk = model.num_moe_experts, model.moe_router_topk
    if experts is None or experts < 1:
        return
    parts = math.lcm(*(x.expert_model_parallel_size for x in layouts))
    model.num_moe_experts = _like(experts, 8, parts)
    # Experts of a token compete: 2 remain where there are several.
    model.moe_router_topk = max(min(topk, 2), round(topk * model.num_moe_experts / experts))


def _scale_training(training: TrainingConfig, layouts: Sequence[Layout]) -> None:
    _reset(training, ["train_tokens", *_fields(training, "eval_")])
    # A pipeline with several chunks takes its micro-batches in rounds of as many as it has stages.
    batch = math.lcm(
        *(
            x.data_parallel_size
            * (x.pipeline_model_parallel_size if x.virtual_pipeline_model_parallel_size > 1 else 1)
            for x in layouts
        )
    )
    # With context parallelism every rank has an early and a late part.
    length = math.lcm(
        *(2 * x.context_parallel_size * x.tensor_model_parallel_size for x in layouts)
    )
    training.micro_batch_size = 1
    training.global_batch_size = -(-_GLOBAL_BATCH_SIZE // batch) * batch
    training.seq_length = -(-_SEQ_LENGTH // length) * length


def _constant_learning_rate(optimizer: OptimizerConfig) -> None:
    _reset(optimizer, _fields(optimizer, "lr_"))
    optimizer.lr = optimizer.min_lr = _LEARNING_RATE
    optimizer.lr_decay_style, optimizer.lr_warmup_iters = "constant", 0


def _fields(section: Any, prefix: str) -> list[str]:
    return [f.name for f in dataclasses.fields(section) if f.name.startswith(prefix)]


def _reset(section: Any, names: Iterable[str]) -> None:
    """Set options of a section to their defaults."""
    default = type(section)()
    for name in names:
        setattr(section, name, getattr(default, name))
