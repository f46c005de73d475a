"""A small copy of a configuration that a laptop's CPU can train at every layout."""

from __future__ import annotations

import copy

from megapoly.config import Config
from megapoly.config.resolve import num_query_groups, resolve, without_gpu_kernels
from megapoly.config.schema import ModelConfig, TrainingConfig
from megapoly.data.tokenizer import load_tokenizer
from megapoly.platform.machine import CPU

_HEAD_WIDTH = 8
# A wrong update changes the next gradients by about 1e-3. Where a gradient is almost zero, Adam
# turns its rounding errors into full steps: at a rate of 2e-3 this alone was 2e-5 after 3 steps.
_LEARNING_RATE = 1e-4
SEQ_LENGTH = 64
GLOBAL_BATCH_SIZE = 8


def scaled_down(config: Config, *, steps: int, bf16: bool) -> Config:
    """Return a small model of the same kind, for one process and the built-in text.

    Activation, norms, attention, router, losses, optimizer and recomputation are the
    configuration's. Sizes are the smallest with the same divisors: for layers powers of two up to
    4, for heads, experts and vocabulary up to 8, for FFN widths up to 8 and 3. Initial weights grow
    as the width shrinks, so that activations keep their size. The learning rate is 1e-4 from the
    first step on. Dropout is disabled, since its random numbers differ between layouts, and
    activations are not compiled. With ``eod_mask_loss`` tokens are masked, and their mean is the
    configuration's.

    Args:
        config: resolved or not; not changed.
        steps: number of training steps.
        bf16: compute in bfloat16; false: fp32.

    Returns:
        The resolved configuration, for one process.
    """
    small = copy.deepcopy(config)
    vocab_size = load_tokenizer(None).vocab_size
    _scale_model(small.model, vocab_size)
    small.data = type(small.data)(seed=config.data.seed, eod_mask_loss=config.data.eod_mask_loss)
    small.logging = type(small.logging)(tensorboard=False)
    small.checkpoint = type(small.checkpoint)(save=False)
    small.training = TrainingConfig(
        train_iters=steps,
        seq_length=SEQ_LENGTH,
        micro_batch_size=1,
        global_batch_size=GLOBAL_BATCH_SIZE,
        calculate_per_token_loss=config.training.calculate_per_token_loss,
        seed=config.training.seed,
        bf16=bf16,
    )
    optimizer = small.optimizer
    optimizer.lr = optimizer.min_lr = _LEARNING_RATE
    optimizer.lr_decay_style, optimizer.lr_warmup_iters = "constant", 0
    optimizer.lr_warmup_init = 0.0
    optimizer.lr_warmup_tokens = optimizer.lr_decay_iters = optimizer.lr_decay_tokens = None
    optimizer.lr_wsd_decay_iters = optimizer.lr_wsd_decay_tokens = None
    _one_process(small)
    without_gpu_kernels(small)
    return resolve(
        small,
        tokenizer_vocab_size=vocab_size,
        machine=CPU,
    )


def _like(size: int, smallest: int, divisor: int) -> int:
    """Return the least number from ``smallest`` on with the remainder of ``size``, or ``size``."""
    return min(size, smallest + (size - smallest) % divisor)


def _scale_model(model: ModelConfig, builtin_vocab_size: int) -> None:
    heads, groups = model.num_attention_heads, num_query_groups(model)
    width = model.hidden_size
    model.num_layers = _like(model.num_layers, 4, 4)
    model.num_attention_heads = _like(heads, 8, 8)
    model.num_query_groups = None
    if groups < heads:
        model.num_query_groups = max(1, model.num_attention_heads * groups // heads)
    model.kv_channels = _HEAD_WIDTH
    model.hidden_size = _HEAD_WIDTH * model.num_attention_heads
    model.init_method_std *= (width / model.hidden_size) ** 0.5
    if model.moe_ffn_hidden_size is None:  # otherwise that is the width of the experts
        model.ffn_hidden_size = _like(model.ffn_hidden_size, 48, 24)
    model.vocab_size = _like(model.vocab_size or builtin_vocab_size, builtin_vocab_size, 8)
    if model.num_moe_experts is not None:
        experts = _like(model.num_moe_experts, 8, 8)
        model.moe_router_topk = min(model.moe_router_topk, max(1, experts // 4))
        model.num_moe_experts = experts
    for name in ("moe_ffn_hidden_size", "moe_shared_expert_intermediate_size"):
        if getattr(model, name) is not None:
            setattr(model, name, _like(getattr(model, name), 48, 24))
    model.hidden_dropout = model.attention_dropout = 0.0
    model.activation_backend = "reference"


def _one_process(config: Config) -> None:
    """Set the layout of one process; keep recomputation, of as many layers as there are."""
    given = config.parallel
    config.parallel = type(given)(
        recompute_granularity=given.recompute_granularity,
        recompute_method=given.recompute_method,
        # The shortest stage of any layout has one layer.
        recompute_num_layers=None if given.recompute_num_layers is None else 1,
        recompute_modules=given.recompute_modules,
        distributed_timeout_minutes=given.distributed_timeout_minutes,
    )
