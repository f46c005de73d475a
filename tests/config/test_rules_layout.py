"""Each rule of layout refuses a valid configuration with one change that breaks it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from megapoly.config.rules import layout
from megapoly.platform.machine import Machine

TP, PP = "parallel.tensor_model_parallel_size", "parallel.pipeline_model_parallel_size"
EP, ETP = "parallel.expert_model_parallel_size", "parallel.expert_tensor_parallel_size"
CP, COMM = "parallel.context_parallel_size", "parallel.cp_comm_type"
VPP = "parallel.virtual_pipeline_model_parallel_size"
SP = "parallel.sequence_parallel"
GRANULARITY, MODULES = "parallel.recompute_granularity", "parallel.recompute_modules"
METHOD, COUNT = "parallel.recompute_method", "parallel.recompute_num_layers"
MOE = {"model.num_moe_experts": 8, "model.moe_ffn_hidden_size": 384}
TP2 = {TP: 2, "world_size": 2}
TP3 = {TP: 3, "world_size": 3, "model.num_attention_heads": 6, "model.kv_channels": 32}
TP3 |= {"training.seq_length": 255}
FULL = {GRANULARITY: "full", METHOD: "uniform", COUNT: 1}


def option(key: str) -> str:
    return f"`{key}`"


CASES: list[dict[str, Any]] = [
    dict(
        rule="world_fits_layout",
        wrong={TP: 2, PP: 2, "world_size": 6},
        words=["processes (6)", option(TP), option(PP), "(4)", "4 and 8"],
        right={TP: 2, PP: 2, "world_size": 4},
    ),
    dict(
        rule="world_fits_layout",
        wrong={EP: 4, "world_size": 2},
        words=["processes (2)", option(ETP), option(EP), "(4)", "4 is the nearest"],
        right={EP: 4, "world_size": 4, "training.micro_batch_size": 2},
        base=MOE,
    ),
    dict(
        rule="world_fits_layout",
        wrong={CP: 2, PP: 2, "world_size": 6},
        words=["processes (6)", option(TP), option(PP), option(CP), "(4)", "4 and 8"],
        right={CP: 2, PP: 2, "world_size": 4},
    ),
    dict(
        rule="world_fits_layout",
        wrong={ETP: 4, TP: 2, "world_size": 2},
        words=["processes (2)", option(ETP), "(4)"],
        right={ETP: 4, TP: 2, "world_size": 4},
        base=MOE,
    ),
    dict(  # a dense model
        rule="world_fits_layout",
        wrong={ETP: 16},
        words=["processes (1)", option(ETP), "(16)", "16 is the nearest"],
        right={ETP: 1},
    ),
    dict(
        rule="experts_divide",
        wrong={EP: 3, "world_size": 3, "training.global_batch_size": 12},
        words=["(3)", "`model.num_moe_experts` (8)", "2 and 4"],
        right={EP: 2, "world_size": 2},
        base=MOE,
    ),
    dict(
        rule="heads_divide",
        wrong=TP3 | {"model.num_attention_heads": 4},
        words=["(3)", "`model.num_attention_heads` (4)", "2 and 4"],
        right=TP3,
    ),
    dict(
        rule="heads_divide",
        wrong={TP: 4, "model.num_query_groups": 2, "world_size": 4},
        words=["(4)", "`model.num_query_groups` (2)", "2 is the nearest"],
        right={TP: 2, "model.num_query_groups": 2, "world_size": 2},
    ),
    dict(
        rule="ffn_widths_divide",
        wrong={"model.ffn_hidden_size": 1000, "model.activation": "swiglu"},
        words=["(1000)", "two thirds", "(3)", "999 and 1002"],
        right={"model.ffn_hidden_size": 1000, "model.activation": "gelu"},
    ),
    dict(
        rule="ffn_widths_divide",
        wrong={"model.ffn_hidden_size": 1000, **TP3},
        words=["`model.ffn_hidden_size` (1000)", option(TP), "999 and 1002"],
        right={"model.ffn_hidden_size": 999, **TP3},
    ),
    dict(
        rule="ffn_widths_divide",
        wrong={"model.ffn_hidden_size": 1005, "model.activation": "swiglu", TP: 4, "world_size": 4},
        words=["(1005)", "3/2 *", option(TP), "(6)", "1002 and 1008"],
        right={"model.ffn_hidden_size": 1008, "model.activation": "swiglu", TP: 4, "world_size": 4},
    ),
    dict(
        rule="ffn_widths_divide",
        wrong={"model.moe_ffn_hidden_size": 385, **TP2},
        words=["`model.moe_ffn_hidden_size` (385)", option(ETP), "384 and 386"],
        right={"model.moe_ffn_hidden_size": 385, ETP: 1, **TP2},
        base=MOE,
    ),
    dict(
        rule="ffn_widths_divide",
        wrong={"model.moe_shared_expert_intermediate_size": 385, ETP: 1, **TP2},
        words=["`model.moe_shared_expert_intermediate_size` (385)", option(TP)],
        right={"model.moe_shared_expert_intermediate_size": 386, ETP: 1, **TP2},
        base=MOE,
    ),
    dict(
        rule="layers_divide",
        wrong={PP: 3, "world_size": 3},
        words=["(3)", "`model.num_layers` (4)", "2 and 4"],
        right={PP: 2, "world_size": 2},
    ),
    dict(
        rule="layers_divide",
        wrong={PP: 2, VPP: 3, "world_size": 2},
        words=[option(VPP), "(6)", "`model.num_layers` (4)", "4 is the nearest"],
        right={PP: 2, VPP: 2, "world_size": 2},
    ),
    dict(
        rule="interleaving_fits",
        wrong={VPP: 2},
        words=["(2)", option(PP), "(1)", "null"],
    ),
    dict(
        rule="interleaving_fits",
        wrong={PP: 2, VPP: 1, "world_size": 2},
        words=["(1)", option(PP), "(2)", "null"],
    ),
    dict(
        rule="interleaving_fits",
        wrong={PP: 2, VPP: 2, "world_size": 4, "training.micro_batch_size": 4},
        words=["micro-batches of a replica (1)", option(PP), "(2)", "2 is the nearest"],
        right={PP: 2, VPP: 2, "world_size": 4, "training.micro_batch_size": 2},
    ),
    dict(
        rule="context_parallel_fits",
        wrong={CP: 2, "training.seq_length": 254, "world_size": 2},
        words=["`training.seq_length` (254)", option(CP), "(4)", "252 and 256"],
        right={CP: 2, "training.seq_length": 252, "world_size": 2},
    ),
    dict(
        rule="context_parallel_fits",
        wrong={CP: 2, TP: 2, "training.seq_length": 252, "world_size": 4},
        words=["`training.seq_length` (252)", option(CP), option(TP), "(8)", "248 and 256"],
        right={CP: 2, TP: 2, "training.seq_length": 252, SP: False, "world_size": 4},
    ),
    dict(
        rule="context_parallel_fits",
        wrong={COMM: "a2a"},
        words=["(a2a)", option(CP), "(1)", "remove it"],
        right={COMM: "a2a", CP: 2, "world_size": 2},
    ),
    dict(
        rule="context_parallel_attention_exists",
        wrong={COMM: "p2p"},
        words=["(p2p)", "Transformer Engine", "all_gather", "a2a"],
        right={COMM: "p2p", "machine": Machine(cuda=True, transformer_engine=True)},
        base={CP: 2, "world_size": 2},
    ),
    dict(
        rule="context_parallel_attention_exists",
        wrong={COMM: "a2a", "model.num_query_groups": 2},
        words=[option(CP), option(TP), "(4)", "`model.num_query_groups` (2)", "2 is the nearest"],
        right={COMM: "a2a"},
        base={CP: 2, TP: 2, "world_size": 4},
    ),
    dict(
        rule="sequence_parallel_fits",
        wrong={SP: True},
        words=["(True)", option(TP), "leave it null"],
        right={SP: True, **TP2},
    ),
    dict(
        rule="sequence_parallel_fits",
        wrong={"training.seq_length": 255, **TP2},
        words=["`training.seq_length` (255)", "254 and 256"],
        right={"training.seq_length": 255, SP: False, **TP2},
    ),
    dict(
        rule="sequence_parallel_fits",
        wrong={SP: False, **TP2},
        words=["(False)", "moe_layer.py"],
        right=TP2,
        base=MOE,
    ),
    dict(
        rule="overlap_has_what_it_needs",
        wrong={"parallel.overlap_param_gather": True, "parallel.overlap_grad_reduce": True},
        words=["(True)", "`parallel.use_distributed_optimizer` (False)"],
        right={
            "parallel.overlap_param_gather": True,
            "parallel.overlap_grad_reduce": True,
            "parallel.use_distributed_optimizer": True,
        },
    ),
    dict(
        rule="overlap_has_what_it_needs",
        wrong={"parallel.overlap_param_gather": True, "parallel.use_distributed_optimizer": True},
        words=["`parallel.overlap_grad_reduce` (False)"],
    ),
    dict(
        rule="recomputation_of_layers_is_complete",
        wrong={GRANULARITY: "full", METHOD: "uniform"},
        words=["(full)", "(uniform)", "(None)"],
        right=FULL,
    ),
    dict(
        rule="recomputation_of_layers_is_complete",
        wrong=FULL | {COUNT: 3},
        words=["(3)", "(4)", "2 and 4"],
        right=FULL | {COUNT: 3, METHOD: "block"},
    ),
    dict(
        rule="recomputation_of_layers_is_complete",
        wrong=FULL | {COUNT: 3, METHOD: "block", PP: 2, "world_size": 2},
        words=["(3)", "(2)"],
        right=FULL | {COUNT: 2, METHOD: "block", PP: 2, "world_size": 2},
    ),
    dict(
        rule="recomputation_of_layers_is_complete",
        wrong=FULL | {COUNT: 2, METHOD: "block", PP: 2, VPP: 2, "world_size": 2},
        words=["(2)", "chunk of a pipeline stage", "(1)"],
        right=FULL | {COUNT: 1, METHOD: "block", PP: 2, VPP: 2, "world_size": 2},
    ),
    dict(
        rule="deterministic_rows_divide",
        wrong={"model.activation_deterministic": True, "model.ffn_hidden_size": 1060},
        words=["`model.ffn_hidden_size` gives (1060)", "(8)", "1056 and 1064"],
        right={"model.activation_deterministic": True},
    ),
    dict(
        rule="deterministic_rows_divide",
        wrong={TP: 3, "world_size": 3, "model.activation_deterministic": True},
        words=["(3)", "1, 2, 4 or 8", "false"],
        base={
            "model.num_attention_heads": 3,
            "model.hidden_size": 384,
            "training.seq_length": 384,
        },
    ),
    dict(
        rule="recomputation_options_have_effect",
        wrong={METHOD: "block"},
        words=["(block)", "(null)", "full"],
    ),
    dict(
        rule="recomputation_options_have_effect",
        wrong={MODULES: ["mlp"]},
        words=["(['mlp'])", "selective"],
        right={MODULES: ["mlp"], GRANULARITY: "selective"},
    ),
    dict(
        rule="recomputation_options_have_effect",
        wrong={GRANULARITY: "selective", COUNT: 1},
        words=["(1)", "(selective)"],
    ),
    dict(
        rule="recomputed_modules_exist",
        wrong={MODULES: ["core_attn", "moe"], GRANULARITY: "selective"},
        words=["(core_attn, moe)", "dense", "take mlp"],
        right=MOE | {MODULES: ["core_attn", "moe"], GRANULARITY: "selective"},
    ),
    dict(
        rule="recomputed_modules_exist",
        wrong={MODULES: ["mlp"], GRANULARITY: "selective"},
        words=["(mlp)", "take moe"],
        base=MOE,
    ),
    dict(
        rule="recomputed_modules_exist",
        wrong={MODULES: [], GRANULARITY: "selective"},
        words=["([])", "null"],
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["rule"])
def test_breaks_exactly_its_rule(
    case: dict[str, Any], assert_breaks_exactly: Callable[..., None]
) -> None:
    assert_breaks_exactly(**case)


def test_every_rule_has_a_case() -> None:
    assert {case["rule"] for case in CASES} == {rule.__name__ for rule in layout.RULES}
