"""Each rule of model refuses a valid configuration with one change that breaks it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from megapoly.config.rules import model

MOE = {"model.num_moe_experts": 8, "model.moe_ffn_hidden_size": 384}
EP = "parallel.expert_model_parallel_size"

CASES: list[dict[str, Any]] = [
    dict(
        rule="tensors_can_be_addressed",
        wrong={"model.hidden_size": 2**30, "model.vocab_size": 2**31 - 1},
        words=["`model.hidden_size` * the padded vocabulary (1073741824 * 2147483647)", "2**60"],
        right={"model.hidden_size": 2**28, "model.vocab_size": 2**31 - 1},
    ),
    dict(
        rule="tensors_can_be_addressed",
        wrong={"training.seq_length": 2**28},
        words=["(1073741824 * 4 * 268435456)", "smaller"],
        right={"training.seq_length": 2**27},
    ),
    dict(
        rule="heads_fit_hidden_size",
        wrong={"model.num_attention_heads": 6},
        words=["`model.hidden_size` (256)", "`model.num_attention_heads` (6)", "252 and 258"],
        right={"model.num_attention_heads": 6, "model.kv_channels": 32},
    ),
    dict(rule="heads_have_even_width", wrong={"model.kv_channels": 33}, words=["(33)", "32 or 34"]),
    dict(
        rule="heads_have_even_width",
        wrong={"model.num_attention_heads": 256},
        words=["(1)", "to 2"],
    ),
    dict(
        rule="query_groups_fit_heads",
        wrong={"model.num_query_groups": 3},
        words=["(3)", "`model.num_attention_heads` (4)", "2 and 4"],
        right={"model.num_query_groups": 2},
    ),
    dict(
        rule="vocabulary_covers_tokenizer",
        wrong={"model.vocab_size": 4095},
        words=["(4095)", "4096"],
        right={"model.vocab_size": 4096},
    ),
    dict(
        rule="positions_cover_samples",
        wrong={"model.max_position_embeddings": 255, "training.seq_length": 256},
        words=["`model.max_position_embeddings` (255)", "`training.seq_length` (256)", "set 256"],
        right={"model.max_position_embeddings": 256, "training.seq_length": 256},
    ),
    dict(
        rule="activation_is_known",
        wrong={"model.activation": "polynrm"},
        words=["(polynrm)", "nearest is polynorm"],
    ),
    dict(
        rule="activation_options_have_effect",
        wrong={"model.activation": "gelu", "model.activation_order": 2},
        words=["`model.activation_order` (2)", "(gelu)", "without coefficients"],
        right={"model.activation": "polyrelu", "model.activation_order": 2},
    ),
    dict(
        rule="activation_options_have_effect",
        wrong={"model.activation": "polyrelu", "model.activation_norm": "l2"},
        words=["`model.activation_norm` (l2)", "(polyrelu)", "without a norm"],
        right={"model.activation": "gated_polynorm", "model.activation_norm": "l2"},
    ),
    dict(
        rule="moe_options_have_effect",
        wrong={"model.moe_ffn_hidden_size": 384, "model.moe_router_topk": 1},
        words=["`model.moe_ffn_hidden_size` (384)", "`model.moe_router_topk` (1)", "dense"],
    ),
    dict(
        rule="moe_options_have_effect",
        wrong={EP: 2, "world_size": 2},
        words=["`parallel.expert_model_parallel_size` (2)"],
        right={"model.num_moe_experts": 8, EP: 2, "world_size": 2},
    ),
    dict(
        rule="moe_options_have_effect",
        wrong={"model.moe_grouped_gemm": False},
        words=["`model.moe_grouped_gemm` (False)", "dense"],
        right=MOE | {"model.moe_grouped_gemm": False},
    ),
    dict(
        rule="dense_width_has_effect",
        wrong={"model.ffn_hidden_size": 96},
        words=["(96)", "(384)"],
        right={"model.ffn_hidden_size": 384},
        base=MOE,
    ),
    dict(
        rule="coefficients_per_expert_need_experts",
        wrong={"model.activation_coefficients": "per_expert"},
        words=["(per_expert)", "shared"],
        right=MOE | {"model.activation_coefficients": "per_expert"},
    ),
    dict(
        rule="router_choice_is_possible",
        wrong={"model.moe_router_topk": 9},
        words=["(9)", "`model.num_moe_experts` (8)"],
        right={"model.moe_router_topk": 8},
        base=MOE,
    ),
    dict(
        rule="router_choice_is_possible",
        wrong={"model.moe_router_topk": 1, "model.moe_router_pre_softmax": False},
        words=["(1)", "always 1"],
        right={"model.moe_router_topk": 1},
        base=MOE,
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["rule"])
def test_breaks_exactly_its_rule(
    case: dict[str, Any], assert_breaks_exactly: Callable[..., None]
) -> None:
    assert_breaks_exactly(**case)


def test_torch_addresses_the_largest_tensor_of_the_rule() -> None:
    """The most elements that the rule allows, and that torch refuses those above."""
    torch.empty(2**30 - 1, 2**30, dtype=torch.float64, device="meta")
    with pytest.raises(RuntimeError, match="overflow"):
        torch.empty(2**30, 2**30, dtype=torch.float64, device="meta")


def test_every_rule_has_a_case() -> None:
    assert {case["rule"] for case in CASES} == {rule.__name__ for rule in model.RULES}
