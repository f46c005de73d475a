"""Gradients at every kind of parallel layout, and combinations of them: `make test-parallel`.

At 2 and 4 processes the layouts have every three choices together that the rules allow together, at
8 processes every two; each with all models that the rules let run there.
"""

from __future__ import annotations

import functools

import pytest
from layouts import run_models, small_config

from megapoly.config import ModelConfig
from megapoly.config.rules import find_problems
from megapoly.platform.machine import CPU
from megapoly.preflight.layouts import all_layouts, covering, parse_layout

pytestmark = pytest.mark.parallel

SIZES = {
    "model.num_layers": 4,
    "model.num_attention_heads": 8,
    "training.seq_length": 32,
    "training.global_batch_size": 8,
}
EXPERTS = {
    "model.num_moe_experts": 8,
    "model.moe_router_topk": 2,
    "model.moe_ffn_hidden_size": 24,
    "model.ffn_hidden_size": ModelConfig().ffn_hidden_size,  # not read beside it
}
RECOMPUTE_LAYERS = {
    "parallel.recompute_granularity": "full",
    "parallel.recompute_method": "uniform",
    "parallel.recompute_num_layers": 1,
}


def recompute(*modules):
    return {
        "parallel.recompute_granularity": "selective",
        "parallel.recompute_modules": ["core_attn", *modules],
    }


DENSE = {
    "swiglu": {"model.activation": "swiglu"},
    "polyrelu, recomputed layers": {"model.activation": "polyrelu"} | RECOMPUTE_LAYERS,
    "polynorm, grouped queries": {"model.num_query_groups": 2},
    "gated polynorm, tied, recomputed parts": {
        "model.activation": "gated_polynorm",
        "model.qk_norm": "full",
        "model.untie_embeddings_and_output_weights": False,
    }
    | recompute("mlp"),
}
MOE = {
    "swiglu, sequential": {"model.activation": "swiglu", "model.moe_grouped_gemm": False},
    "polynorm, shared expert": {"model.moe_shared_expert_intermediate_size": 24},
    "polynorm per expert, all-gather": {
        "model.activation_coefficients": "per_expert",
        "model.moe_token_dispatcher_type": "allgather",
    },
    "gated polynorm per expert, sequential, recomputed layers": {
        "model.activation": "gated_polynorm",
        "model.activation_coefficients": "per_expert",
        "model.moe_grouped_gemm": False,
    }
    | RECOMPUTE_LAYERS,
    "polyrelu, shared expert, recomputed experts": {
        "model.activation": "polyrelu",
        "model.qk_norm": "full",
        "model.moe_shared_expert_intermediate_size": 24,
    }
    | recompute("moe"),
}
MOE = {name: EXPERTS | options for name, options in MOE.items()}
MODELS = {"dense": DENSE, "moe": MOE}
STRENGTH = {1: 3, 2: 3, 4: 3, 8: 2}


def runs(options, layout):
    """Whether the rules let a model run at a layout."""
    return not find_problems(
        small_config(options | layout.options),
        world_size=layout.world_size,
        machine=CPU,
    )


def models_at(kind, layout):
    models = {name: SIZES | options for name, options in MODELS[kind].items()}
    return {name: options for name, options in models.items() if runs(options, layout)}


def cases(kind):
    models = [SIZES | options for options in MODELS[kind].values()]
    for world_size, strength in STRENGTH.items():
        layouts = all_layouts(
            world_size,
            num_experts=8 if kind == "moe" else None,
            is_allowed=lambda layout: any(runs(options, layout) for options in models),
        )
        for layout in covering(layouts, strength):
            yield kind, layout.name


@functools.cache
def one_process(kind):
    # Nothing recomputed, one expert after another as the model says.
    models = {
        name: {key: value for key, value in (SIZES | options).items() if "recompute" not in key}
        for name, options in MODELS[kind].items()
    }
    return run_models(models, 1, {})


@pytest.mark.parametrize(("kind", "name"), [*cases("dense"), *cases("moe")])
def test_gradients_are_those_of_one_process(kind, name):
    layout = parse_layout(name)
    results = run_models(models_at(kind, layout), layout.world_size, layout.options)
    assert results
    for model, actual in results.items():
        expected = one_process(kind)[model]
        assert actual.gradients.keys() == expected.gradients.keys()
        errors = {
            key: ((actual.gradients[key] - gradient).norm() / gradient.norm()).item()
            for key, gradient in expected.gradients.items()
        }
        assert {key: error for key, error in errors.items() if not error < 1e-5} == {}, model
        for rank in actual.ranks:
            assert rank.grad_norm == pytest.approx(expected.norm_of_gradients, rel=1e-6), model
