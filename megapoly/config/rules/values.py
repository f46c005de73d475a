"""Rules on one number at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from megapoly.config.options import OPTIONS, Option
from megapoly.config.ranges import LARGEST_COUNT, SEEDS_BELOW, Range
from megapoly.config.rules.facts import Facts, Rule, value_of
from megapoly.polynomial import ORDERS

LARGEST_TOKENS = 10**18 - 1
LARGEST_RATE = 1e30  # far from the largest float32, of which the optimizer's state is

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
    "training.spike_max_skips",
    "logging.log_interval",
    "logging.profile_step_start",
    "logging.profile_step_end",
)
AT_LEAST_ZERO = (
    "model.moe_aux_loss_coeff",
    "model.moe_z_loss_coeff",
    "data.num_workers",
    "parallel.hang_timeout_s",
    "optimizer.min_lr",
    "optimizer.lr_warmup_init",
    "optimizer.lr_warmup_iters",
    "optimizer.lr_warmup_tokens",
    "optimizer.weight_decay",
    "optimizer.clip_grad",
    "training.eval_interval",
    "training.eval_tasks_interval",
    "checkpoint.save_interval",
    "checkpoint.keep",
    "logging.detail_interval",
)
ABOVE_ZERO = (
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
SEEDS = ("data.seed", "training.seed")
# The largest value of an option; of the others it is LARGEST_COUNT, LARGEST_TOKENS or LARGEST_RATE.
MOST: Mapping[str, float] = {
    "model.num_layers": 10_000,  # each is built, one after another
    "model.num_moe_experts": 65_536,
    "model.rotary_base": 10**12,
    "model.make_vocab_size_divisible_by": 2**20,
    "model.moe_aux_loss_coeff": 1e6,
    "model.moe_z_loss_coeff": 1e6,
    "model.normalization_eps": 1.0,
    "model.init_method_std": 1000.0,
    "parallel.distributed_timeout_minutes": 10_080.0,  # a week
    "parallel.hang_timeout_s": 604_800.0,
    "data.num_workers": 64,  # on each rank: a host of 8 has 512 processes
    "optimizer.weight_decay": 1000.0,
    "optimizer.adam_eps": 1.0,
    "training.fp8_amax_history_len": 65_536,
    "logging.peak_tflops": 1e9,
}
# Of one entry of `data.blend` or `data.validation`.
ENTRY_RANGES: Mapping[str, Range] = {
    "weight": Range(0, 1e18, open_below=True),
    "tokens": Range(0, LARGEST_TOKENS, open_below=True),
    "epochs": Range(0, 1e6, open_below=True),
}


def _most(option: Option) -> float:
    if option.base is float:
        most: float = LARGEST_RATE
    else:
        most = LARGEST_TOKENS if option.key.endswith("_tokens") else LARGEST_COUNT
    return MOST.get(option.key, most)


RANGES: Mapping[str, Range] = {
    **{key: Range(1, _most(OPTIONS[key])) for key in AT_LEAST_ONE},
    **{key: Range(0, _most(OPTIONS[key])) for key in AT_LEAST_ZERO},
    **{key: Range(0, _most(OPTIONS[key]), open_below=True) for key in ABOVE_ZERO},
    **{key: Range(0, 1, open_above=True) for key in FRACTIONS},
    **{key: Range(0, SEEDS_BELOW, open_above=True) for key in SEEDS},
    "training.spike_threshold": Range(1, 1e6),
    "training.spike_window": Range(2, 10_000),  # each step sorts it, and run.json has it
    "model.activation_eps": Range(1e-30, 1e6),  # of the operators, megapoly/ops/arguments.py
}


def numbers_are_in_range(facts: Facts) -> Iterator[str]:
    """Sizes, rates and probabilities are in their ranges."""
    for key, range_ in RANGES.items():
        value = value_of(facts.config, key)
        if value is not None and value not in range_:
            yield f"`{key}` ({value}) must be {range_}"


def activation_order_is_known(facts: Facts) -> Iterator[str]:
    """Polynomials have order 2, 3 or 4."""
    order = facts.config.model.activation_order
    if order not in ORDERS:
        nearest = min(ORDERS, key=lambda known: abs(known - order))
        yield f"`model.activation_order` ({order}) must be 2, 3 or 4; {nearest} is the nearest"


RULES: tuple[Rule, ...] = (numbers_are_in_range, activation_order_is_known)
