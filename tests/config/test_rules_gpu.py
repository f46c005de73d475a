"""Each rule of gpu refuses a valid configuration with one change that breaks it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from megapoly.config.rules import gpu
from megapoly.platform.machine import Machine


def machine(capability: tuple[int, int] | None, **others: Any) -> Machine:
    known = {"transformer_engine": True, "transformer_engine_version": "2.11.0"}
    return Machine(cuda=True, compute_capability=capability, **known | others)


A100, ADA, H100, B200, RTX = (
    machine(capability) for capability in ((8, 0), (8, 9), (9, 0), (10, 0), (12, 0))
)
FP8 = {
    "training.fp8": "hybrid",
    "training.bf16": True,
    "machine": H100,
}
RECIPE = "training.fp8_recipe"
ROPE, PERMUTE = "model.apply_rope_fusion", "model.moe_permute_fusion"
FUSED = "training.gradient_accumulation_fusion"
EXPERTS = {"model.num_moe_experts": 4, "model.moe_ffn_hidden_size": 256}
TP2 = {"world_size": 2, "parallel.tensor_model_parallel_size": 2}
GATED = {"model.activation": "gated_polynorm"}

CASES: list[dict[str, Any]] = [
    dict(
        rule="transformer_engine_version_fits",
        wrong={"machine": machine((8, 0), transformer_engine_version="2.8.0+c1f9e66")},
        words=[
            "(2.8.0+c1f9e66)",
            "at least 2.9 and below 2.12",
            "pip install 'megapoly[gpu]'",
            "false",
        ],
        right={"machine": machine((8, 0), transformer_engine_version="2.9.0+70f5366")},
    ),
    dict(
        rule="transformer_engine_version_fits",
        wrong={"machine": machine((8, 0), transformer_engine_version="2.12.0")},
        words=["(2.12.0)"],
        right={
            "machine": machine((8, 0), transformer_engine_version="2.12.0"),
            "model.transformer_engine": False,
        },
    ),
    dict(
        rule="fusions_are_installed",
        wrong={ROPE: True},
        words=["`model.apply_rope_fusion` (True)", "leave it null"],
        right={ROPE: True, "machine": A100},
    ),
    dict(
        rule="fusions_are_installed",
        base=EXPERTS,
        wrong={PERMUTE: True, "machine": A100, "model.transformer_engine": False},
        words=["`model.moe_permute_fusion` (True)", "leave it null"],
        right={PERMUTE: True, "machine": A100},
    ),
    dict(
        rule="fusions_are_installed",
        wrong={FUSED: True, "machine": A100},
        words=["`training.gradient_accumulation_fusion` (True)", "apex"],
        right={FUSED: True, "machine": machine((8, 0), apex=True)},
    ),
    dict(
        rule="fp8_options_have_effect",
        wrong={RECIPE: "delayed"},
        words=["`training.fp8_recipe` (delayed)", "without `training.fp8`", "hybrid"],
        right=FP8 | {RECIPE: "delayed"},
    ),
    dict(
        rule="fp8_options_have_effect",
        base=FP8,
        wrong={"training.fp8_amax_history_len": 16},
        words=["`training.fp8_amax_history_len` (16)", "(tensorwise)", "take delayed"],
        right={"training.fp8_amax_history_len": 16, RECIPE: "delayed"},
    ),
    dict(
        rule="fp8_layers_fit_recipe",
        base=FP8 | {"training.first_last_layers_bf16": True},
        wrong={RECIPE: "delayed"},
        words=["(delayed)", "take tensorwise"],
    ),
    dict(
        rule="fp8_layers_fit_recipe",
        base=FP8 | {"training.first_last_layers_bf16": True},
        wrong={"model.num_layers": 2},
        words=["`model.num_layers` (2)"],
        right={"model.num_layers": 3},
    ),
    dict(
        rule="fp8_has_what_it_needs",
        base=FP8,
        wrong={"training.device": "cpu"},
        words=["`training.fp8` (hybrid)", "cuda, not cpu", "null"],
    ),
    dict(
        rule="fp8_has_what_it_needs",
        base=FP8,
        wrong={"model.transformer_engine": False},
        words=["needs Transformer Engine", "pip install 'megapoly[gpu]'"],
    ),
    dict(
        rule="fp8_has_what_it_needs",
        base=FP8,
        wrong={"training.bf16": False},
        words=["`training.bf16` (False)", "set it to true"],
    ),
    dict(
        rule="fp8_recipe_runs_on_device",
        base=FP8,
        wrong={"machine": A100},
        words=[
            "(tensorwise)",
            "8.9 or above",
            "this GPU has 8.0",
            "`training.fp8` to null",
            "bf16",
        ],
        right={"machine": ADA},
    ),
    dict(
        rule="fp8_recipe_runs_on_device",
        base=FP8,
        wrong={"machine": H100, RECIPE: "mxfp8"},
        words=[
            "(mxfp8)",
            "10.0 or above and below 12.0",
            "has 9.0",
            "blockwise, tensorwise or delayed",
        ],
        right={"machine": B200, RECIPE: "mxfp8"},
    ),
    dict(
        rule="fp8_recipe_runs_on_device",
        base=FP8,
        wrong={"machine": RTX, RECIPE: "mxfp8"},
        words=["has 12.0", "blockwise, tensorwise or delayed"],
        right={"machine": machine(None), RECIPE: "mxfp8"},
    ),
    dict(
        rule="fp8_recipe_runs_on_device",
        base=FP8,
        wrong={"machine": ADA, RECIPE: "blockwise"},
        words=["9.0 or above,", "has 8.9", "take tensorwise or delayed"],
        right={"machine": machine((9, 0), cuda_version=(12, 9)), RECIPE: "blockwise"},
    ),
    dict(
        rule="fp8_recipe_runs_on_device",
        base=FP8,
        wrong={"machine": machine((9, 0), cuda_version=(12, 8)), RECIPE: "blockwise"},
        words=["needs CUDA 12.9", "built with 12.8", "tensorwise"],
        right={"machine": machine((9, 0), cuda_version=(12, 8)), RECIPE: "delayed"},
    ),
    dict(
        rule="fp8_sizes_fit",
        base=FP8 | {"model.kv_channels": 64},
        wrong={"model.hidden_size": 264},
        words=["`model.hidden_size` (264)", "the unit of tensorwise (16)", "256 and 272"],
        right={"model.hidden_size": 272},
    ),
    dict(
        rule="fp8_sizes_fit",
        base=FP8 | TP2 | {"model.kv_channels": 64, RECIPE: "blockwise"},
        wrong={"model.hidden_size": 272},
        words=["(272)", "the unit of blockwise where ranks gather (128)", "256 and 384"],
        right={"model.hidden_size": 272, "world_size": 1, "parallel.tensor_model_parallel_size": 1},
    ),
    dict(
        rule="fp8_sizes_fit",
        base=FP8 | TP2 | {"model.kv_channels": 64},
        wrong={"model.kv_channels": 6},
        words=["`model.num_attention_heads` * `model.kv_channels` (24)", "(32)"],
        right={"model.kv_channels": 8},
    ),
    dict(
        rule="fp8_sizes_fit",
        base=FP8 | TP2,
        wrong={"model.ffn_hidden_size": 1040},
        words=[
            "`model.ffn_hidden_size` (1040)",
            "tensor_model_parallel_size` (32)",
            "1024 and 1056",
        ],
        right={"model.ffn_hidden_size": 1056},
    ),
    dict(
        rule="fp8_sizes_fit",
        base=FP8 | GATED,
        wrong={"model.ffn_hidden_size": 1056 + 12},
        words=["(1068)", "3/2 * the unit of tensorwise", "(24)", "1056 and 1080"],
        right={"model.ffn_hidden_size": 1080},  # of which two thirds are 720
    ),
    dict(
        rule="fp8_sizes_fit",
        base=FP8 | EXPERTS | {"machine": B200},
        wrong={RECIPE: "mxfp8", "model.moe_ffn_hidden_size": 272},
        words=["`model.moe_ffn_hidden_size` (272)", "(32)", "256 and 288"],
        right={RECIPE: "tensorwise", "model.moe_ffn_hidden_size": 272},
    ),
    dict(
        rule="fp8_sizes_fit",
        base=FP8,
        wrong={"training.micro_batch_size": 1, "training.seq_length": 40},
        words=["`training.micro_batch_size` * `training.seq_length` (40)", "32 and 48"],
        right={"training.micro_batch_size": 2, "training.seq_length": 40},
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["rule"])
def test_breaks_exactly_its_rule(
    case: dict[str, Any], assert_breaks_exactly: Callable[..., None]
) -> None:
    assert_breaks_exactly(**case)


def test_every_rule_has_a_case() -> None:
    assert {case["rule"] for case in CASES} == {rule.__name__ for rule in gpu.RULES}
