"""Rules on the architecture alone."""

from __future__ import annotations

import math
from collections.abc import Iterator

from megapoly.config import resolve
from megapoly.config.rules.facts import Facts, Rule, have_no_effect, must_be_multiple, must_divide
from megapoly.config.schema import ModelConfig
from megapoly.errors import ConfigError

MOE_OPTIONS = (
    "model.moe_ffn_hidden_size",
    "model.moe_shared_expert_intermediate_size",
    "model.moe_router_topk",
    "model.moe_router_pre_softmax",
    "model.moe_router_dtype",
    "model.moe_aux_loss_coeff",
    "model.moe_z_loss_coeff",
    "model.moe_token_dispatcher_type",
    "model.moe_grouped_gemm",
    "model.moe_permute_fusion",
    "parallel.expert_model_parallel_size",
)
COEFFICIENT_OPTIONS = (
    "model.activation_order",
    "model.activation_coefficients",
    "model.activation_backend",
    "model.activation_deterministic",
)
NORM_OPTIONS = ("model.activation_norm", "model.activation_eps")


def heads_fit_hidden_size(facts: Facts) -> Iterator[str]:
    """Without ``kv_channels`` the heads share the width of the residual stream."""
    model = facts.config.model
    if model.kv_channels is None:
        yield from must_be_multiple(
            "without `model.kv_channels`, `model.hidden_size`",
            model.hidden_size,
            model.num_attention_heads,
            "`model.num_attention_heads`",
        )


def heads_have_even_width(facts: Facts) -> Iterator[str]:
    """The rotary embedding rotates pairs of channels."""
    model = facts.config.model
    heads = model.num_attention_heads
    if model.kv_channels is None and (heads < 1 or model.hidden_size % heads):
        return
    width = resolve.kv_channels(model)
    if width % 2:
        nearest = f"{width - 1} or {width + 1}" if width > 1 else "2"
        yield (
            f"the width of a head ({width}) must be even for the rotary embedding; set "
            f"`model.kv_channels` to {nearest}"
        )


def query_groups_fit_heads(facts: Facts) -> Iterator[str]:
    """Every key/value head serves the same number of query heads."""
    model = facts.config.model
    if model.num_query_groups is not None:
        yield from must_divide(
            "`model.num_query_groups`",
            model.num_query_groups,
            model.num_attention_heads,
            "`model.num_attention_heads`",
        )


def vocabulary_covers_tokenizer(facts: Facts) -> Iterator[str]:
    """Every id of the tokenizer has an embedding."""
    given, needed = facts.config.model.vocab_size, facts.tokenizer_vocab_size
    if given is not None and needed is not None and 1 <= given < needed:
        yield (
            f"`model.vocab_size` ({given}) must be at least the tokenizer's ({needed}); set "
            f"{needed}, or null to take the tokenizer's"
        )


def positions_cover_samples(facts: Facts) -> Iterator[str]:
    """An export does not claim fewer positions than the model was trained on."""
    longest, length = facts.config.model.max_position_embeddings, facts.config.training.seq_length
    if longest is not None and length > longest >= 1:
        yield (
            f"`model.max_position_embeddings` ({longest}) must be at least `training.seq_length` "
            f"({length}); set {length} to train on longer texts, or null to take "
            "`training.seq_length`"
        )


def activation_is_known(facts: Facts) -> Iterator[str]:
    """The registry has the activation."""
    from megapoly.activations import registry

    try:
        registry.get(facts.config.model.activation)
    except ConfigError as error:
        yield from error.problems


def activation_options_have_effect(facts: Facts) -> Iterator[str]:
    """Options of polynomials and of their norm need an activation that has them."""
    activation, config = facts.activation, facts.config
    if activation is None:
        return
    for has, keys, kind in (
        (activation.has_coefficients, COEFFICIENT_OPTIONS, "without coefficients"),
        (activation.normalized, NORM_OPTIONS, "without a norm"),
    ):
        if not has:
            condition = f"with `model.activation` ({config.model.activation}), which is {kind}"
            yield from have_no_effect(config, keys, condition)


def moe_options_have_effect(facts: Facts) -> Iterator[str]:
    """Options of experts need experts."""
    if not facts.is_moe:
        yield from have_no_effect(
            facts.config,
            MOE_OPTIONS,
            "in a dense model (`model.num_moe_experts` is null)",
            ", or set the number of experts",
        )


def dense_width_has_effect(facts: Facts) -> Iterator[str]:
    """A layer of experts has no dense FFN; its width is only the default of the experts' width."""
    width = facts.config.model.moe_ffn_hidden_size
    if facts.is_moe and width not in (None, facts.config.model.ffn_hidden_size):
        condition = f"with `model.moe_ffn_hidden_size` ({width}) in a mixture of experts"
        yield from have_no_effect(facts.config, ["model.ffn_hidden_size"], condition)


def coefficients_per_expert_need_experts(facts: Facts) -> Iterator[str]:
    """One coefficient set for each expert needs experts."""
    activation = facts.activation
    requested = facts.config.model.activation_coefficients == "per_expert"
    if requested and not facts.is_moe and activation is not None and activation.has_coefficients:
        yield (
            "`model.activation_coefficients` (per_expert) needs a mixture of experts; set "
            "`model.num_moe_experts`, or take shared"
        )


def router_choice_is_possible(facts: Facts) -> Iterator[str]:
    """A token goes to at most all experts, and top-1 keeps a gradient for the router."""
    model = facts.config.model
    topk, experts = model.moe_router_topk, model.num_moe_experts
    if experts is None or experts < 1:
        return
    if topk > experts:
        yield (
            f"`model.moe_router_topk` ({topk}) must not exceed `model.num_moe_experts` "
            f"({experts}); {experts} is the largest"
        )
    if topk == 1 and not model.moe_router_pre_softmax:
        yield (
            "`model.moe_router_topk` (1) needs `model.moe_router_pre_softmax` (False): a softmax "
            "over one expert is always 1; set it to true, or choose 2 experts"
        )


def tensors_can_be_addressed(facts: Facts) -> Iterator[str]:
    """No tensor has more elements than torch can address in bytes, 2**60 of 8 bytes."""
    model, training = facts.config.model, facts.config.training
    hidden, width = "`model.hidden_size`", "the width of the FFN"
    rows = "`training.micro_batch_size` * `training.seq_length`"
    heads, vocabulary = "`model.num_attention_heads`", "the padded vocabulary"
    sizes = {
        hidden: model.hidden_size,
        width: max(size or 0 for size in _ffn_sizes(model)),
        rows: training.micro_batch_size * training.seq_length,
        heads: model.num_attention_heads,
        vocabulary: max(model.vocab_size or 0, model.make_vocab_size_divisible_by),
        "`model.kv_channels`": model.kv_channels or 1,
        "`model.num_moe_experts`": model.num_moe_experts or 1,
        "`training.seq_length`": training.seq_length,
    }
    for tensor in (
        (hidden, vocabulary),
        (hidden, heads, "`model.kv_channels`"),
        (hidden, width, "`model.num_moe_experts`"),
        (rows, hidden),
        (rows, width),
        (rows, vocabulary),
        (rows, heads, "`model.kv_channels`"),
        (rows, heads, "`training.seq_length`"),
    ):
        values = [sizes[name] for name in tensor]
        if min(values) >= 1 and math.prod(values) >= 2**60:
            yield (
                f"{' * '.join(tensor)} ({' * '.join(map(str, values))}) are more elements than a "
                "tensor can have, 2**60; make one of them smaller"
            )


def _ffn_sizes(model: ModelConfig) -> tuple[int | None, ...]:
    return (
        model.ffn_hidden_size,
        model.moe_ffn_hidden_size,
        model.moe_shared_expert_intermediate_size,
    )


RULES: tuple[Rule, ...] = (
    heads_fit_hidden_size,
    heads_have_even_width,
    query_groups_fit_heads,
    vocabulary_covers_tokenizer,
    positions_cover_samples,
    activation_is_known,
    activation_options_have_effect,
    moe_options_have_effect,
    dense_width_has_effect,
    coefficients_per_expert_need_experts,
    router_choice_is_possible,
    tensors_can_be_addressed,
)
