"""Rules on one number at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from megapoly.config.rules.facts import Facts, Rule, value_of
from megapoly.polynomial import ORDERS

AT_LEAST_ONE = (
    "model.num_layers",
    "model.hidden_size",
    "model.num_attention_heads",
    "model.num_query_groups",
    "model.kv_channels",
    "model.ffn_hidden_size",
    "model.rotary_base",
    "model.vocab_size",
    "model.make_vocab_size_divisible_by",
    "model.max_position_embeddings",
    "model.num_moe_experts",
    "model.moe_ffn_hidden_size",
    "model.moe_shared_expert_intermediate_size",
    "model.moe_router_topk",
    "parallel.tensor_model_parallel_size",
    "parallel.pipeline_model_parallel_size",
    "parallel.virtual_pipeline_model_parallel_size",
    "parallel.context_parallel_size",
    "parallel.expert_model_parallel_size",
    "parallel.expert_tensor_parallel_size",
    "parallel.recompute_num_layers",
    "optimizer.lr_decay_iters",
    "optimizer.lr_decay_tokens",
    "optimizer.lr_wsd_decay_iters",
    "optimizer.lr_wsd_decay_tokens",
    "training.train_iters",
    "training.train_tokens",
    "training.seq_length",
    "training.micro_batch_size",
    "training.global_batch_size",
    "training.fp8_amax_history_len",
    "training.eval_iters",
    "training.eval_tasks_limit",
    "logging.log_interval",
    "logging.profile_step_start",
    "logging.profile_step_end",
)
AT_LEAST_ZERO = (
    "model.moe_aux_loss_coeff",
    "model.moe_z_loss_coeff",
    "data.num_workers",
    "optimizer.min_lr",
    "optimizer.lr_warmup_init",
    "optimizer.lr_warmup_iters",
    "optimizer.lr_warmup_tokens",
    "optimizer.weight_decay",
    "optimizer.clip_grad",
    "training.seed",
    "training.eval_interval",
    "training.eval_tasks_interval",
    "checkpoint.save_interval",
    "checkpoint.keep",
    "logging.detail_interval",
)
ABOVE_ZERO = (
    "model.activation_eps",
    "model.normalization_eps",
    "model.init_method_std",
    "parallel.distributed_timeout_minutes",
    "optimizer.lr",
    "optimizer.adam_eps",
    "logging.peak_tflops",
)
FRACTIONS = (
    "model.hidden_dropout",
    "model.attention_dropout",
    "optimizer.adam_beta1",
    "optimizer.adam_beta2",
)
SEEDS = ("data.seed",)  # numpy's RandomState takes 32 bits
RANGES: tuple[tuple[tuple[str, ...], Callable[[float], bool], str], ...] = (
    (AT_LEAST_ONE, lambda value: value >= 1, "at least 1"),
    (AT_LEAST_ZERO, lambda value: value >= 0, "at least 0"),
    (ABOVE_ZERO, lambda value: value > 0, "above 0"),
    (FRACTIONS, lambda value: 0 <= value < 1, "at least 0 and below 1"),
    (SEEDS, lambda value: 0 <= value < 2**32, "at least 0 and below 4294967296"),
)


def numbers_are_in_range(facts: Facts) -> Iterator[str]:
    """Sizes, rates and probabilities are in their ranges."""
    for keys, is_right, range_ in RANGES:
        for key in keys:
            value = value_of(facts.config, key)
            if value is not None and not is_right(value):
                yield f"`{key}` ({value}) must be {range_}"


def activation_order_is_known(facts: Facts) -> Iterator[str]:
    """Polynomials have order 2, 3 or 4."""
    order = facts.config.model.activation_order
    if order not in ORDERS:
        nearest = min(ORDERS, key=lambda known: abs(known - order))
        yield f"`model.activation_order` ({order}) must be 2, 3 or 4; {nearest} is the nearest"


RULES: tuple[Rule, ...] = (numbers_are_in_range, activation_order_is_known)
