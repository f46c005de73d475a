"""Weights, gradients and their norm do not depend on the layout."""

from __future__ import annotations

import functools

import pytest
import torch
from layouts import EXPERTS, run_models

MODELS = {
    "dense polynorm": {"model.num_query_groups": 2},
    "dense gated_polynorm, tied": {
        "model.activation": "gated_polynorm",
        "model.qk_norm": "full",
        "model.untie_embeddings_and_output_weights": False,
    },
    "dense polyprelu": {
        "model.activation": "polyprelu",
        "model.qk_norm": "head",
        "optimizer.decay_norms": True,
    },
    "experts polynorm, shared expert": EXPERTS
    | {"model.moe_shared_expert_intermediate_size": 24, "model.qk_norm": "head"},
    "experts polynorm per expert": EXPERTS
    | {
        "model.activation_coefficients": "per_expert",
        "model.num_query_groups": 2,
        "model.qk_norm": "full",
    },
    "experts gated_polynorm per expert": EXPERTS
    | {"model.activation": "gated_polynorm", "model.activation_coefficients": "per_expert"},
    "experts polyrelu": EXPERTS | {"model.activation": "polyrelu", "optimizer.decay_norms": True},
    "experts polyprelu per expert": EXPERTS
    | {"model.activation": "polyprelu", "model.activation_coefficients": "per_expert"},
}
SHARED, GATED = "experts polynorm, shared expert", "experts gated_polynorm per expert"
TIED, SLOPED = "dense gated_polynorm, tied", "experts polyprelu per expert"
# The same models with experts one after another.
SEQUENTIAL = {f"{name}, sequential": name for name in (SHARED, GATED)}
MODELS |= {
    sequential: MODELS[name] | {"model.moe_grouped_gemm": False}
    for sequential, name in SEQUENTIAL.items()
}
# Enough layers for two chunks on each of two pipeline stages.
DEEP, DEEP_TIED = (f"{name}, 4 layers" for name in (SHARED, TIED))
MODELS |= {f"{name}, 4 layers": MODELS[name] | {"model.num_layers": 4} for name in (SHARED, TIED)}
DENSE = [name for name in MODELS if name.startswith("dense") and name != DEEP_TIED]
ROUTED = [name for name in MODELS if name.startswith("experts") and name != DEEP]

T, E, ET, P = (
    f"parallel.{kind}_parallel_size"
    for kind in ("tensor_model", "expert_model", "expert_tensor", "pipeline_model")
)
V, C = "parallel.virtual_pipeline_model_parallel_size", "parallel.context_parallel_size"
EXCHANGED_HEADS = {C: 2, "parallel.cp_comm_type": "a2a"}
GATHERED_SEQUENCE = {C: 2, "parallel.cp_comm_type": "all_gather"}
NO_SEQUENCE_PARALLEL = {"parallel.sequence_parallel": False}
DISTRIBUTED_OPTIMIZER = {"parallel.use_distributed_optimizer": True}
ALL_GATHER = {"model.moe_token_dispatcher_type": "allgather"}
LAYOUTS = {
    "TP 2": (2, {T: 2}, [*DENSE, *ROUTED]),
    "TP 2 without sequence parallelism": (2, {T: 2} | NO_SEQUENCE_PARALLEL, DENSE[1:]),
    "TP 2, whole experts": (2, {T: 2, ET: 1}, [SHARED, GATED, SLOPED, *SEQUENTIAL]),
    "EP 2": (2, {E: 2}, [SHARED, GATED, *SEQUENTIAL]),
    "EP 2, all-gather": (2, {E: 2} | ALL_GATHER, [SHARED]),
    "TP 2 x EP 2, whole experts": (2, {T: 2, E: 2, ET: 1}, ROUTED),
    "TP 2 x EP 2": (4, {T: 2, E: 2}, [SHARED, GATED, SLOPED, *SEQUENTIAL]),
    "PP 2": (2, {P: 2}, [TIED, GATED]),
    "PP 2, interleaved": (2, {P: 2, V: 2}, [DEEP, DEEP_TIED]),
    "CP 2": (2, GATHERED_SEQUENCE, [DENSE[0], TIED, SHARED, GATED]),
    "CP 2, exchanged heads": (2, EXCHANGED_HEADS, [DENSE[0], SHARED]),
    "CP 2 x EP 2": (2, GATHERED_SEQUENCE | {E: 2}, [SHARED, GATED]),
    "experts split over DP 2": (2, {ET: 2}, [SHARED, GATED, SLOPED]),
    "TP 4, experts cut in 2": (4, {T: 4, ET: 2}, [SHARED, GATED]),
    "DP 2, distributed optimizer": (2, DISTRIBUTED_OPTIMIZER, [TIED, GATED]),
}
CASES = [(layout, model) for layout, (_, _, models) in LAYOUTS.items() for model in models]


@functools.cache
def one_process():
    return run_models(MODELS, 1, {})


@functools.cache
def at_layout(layout):
    num_ranks, options, names = LAYOUTS[layout]
    return run_models({name: MODELS[name] for name in names}, num_ranks, options)


@pytest.mark.parametrize(("layout", "model"), CASES)
def test_initial_weights_are_equal_to_the_bit(layout, model):
    expected, actual = one_process()[model].weights, at_layout(layout)[model].weights
    assert actual.keys() == expected.keys()
    for key, weight in expected.items():
        assert torch.equal(actual[key], weight), key


@pytest.mark.parametrize(("layout", "model"), CASES)
def test_gradients_are_those_of_one_process(layout, model):
    expected, actual = one_process()[model].gradients, at_layout(layout)[model].gradients
    assert actual.keys() == expected.keys()
    errors = {
        key: ((actual[key] - gradient).norm() / gradient.norm()).item()
        for key, gradient in expected.items()
    }
    assert all(expected[key].any() for key in expected)
    assert {key: error for key, error in errors.items() if not error < 1e-5} == {}


@pytest.mark.parametrize(
    ("layout", "model"),
    [
        *(case for case in CASES if case[1] in SEQUENTIAL),
        *(("one process", model) for model in SEQUENTIAL),
    ],
)
def test_experts_one_after_another_are_the_grouped_ones(layout, model):
    results = one_process() if layout == "one process" else at_layout(layout)
    expected, actual = results[SEQUENTIAL[model]], results[model]
    assert actual.weights.keys() == expected.weights.keys()
    for key, weight in expected.weights.items():
        assert torch.equal(actual.weights[key], weight), key
    for key, gradient in expected.gradients.items():
        assert (actual.gradients[key] - gradient).norm() < 1e-6 * gradient.norm(), key


@pytest.mark.parametrize(("layout", "model"), [*CASES, *(("one process", m) for m in MODELS)])
def test_gradient_norm_counts_every_parameter_once(layout, model):
    results = one_process() if layout == "one process" else at_layout(layout)
    for rank in results[model].ranks:
        assert rank.grad_norm == pytest.approx(results[model].norm_of_gradients, rel=1e-6)


@pytest.mark.parametrize("layout", ["one process", "TP 2", "TP 2 x EP 2, whole experts"])
def test_matrices_decay_coefficients_do_not_and_norms_on_request(layout):
    results = one_process() if layout == "one process" else at_layout(layout)
    for model, result in results.items():
        norms = {name for name in result.decay if name.endswith("norm.weight")}
        coefficients = {name for name in result.decay if ".activation_func." in name}
        expected = result.decay.keys() - coefficients
        if not MODELS[model].get("optimizer.decay_norms"):
            expected -= norms
        assert norms and coefficients
        assert {name for name, decays in result.decay.items() if decays} == expected, model
