"""Messages that are planned are those that training sends, to the byte where nothing is routed."""

from __future__ import annotations

import collections
import functools

import pytest
from message_jobs import messages_of_rank
from small_models import EXPERTS, small_model

from megapoly.platform.gpus import GPUS
from megapoly.preflight.planning.collectives import collectives
from megapoly.testing import run_on_ranks

A100 = GPUS["a100-80g"]
T, E, ET, P, C = (
    f"parallel.{kind}_parallel_size"
    for kind in ("tensor_model", "expert_model", "expert_tensor", "pipeline_model", "context")
)
INTERLEAVED = {
    "parallel.virtual_pipeline_model_parallel_size": 2,
    "model.num_layers": 4,
}
TIED = {"model.untie_embeddings_and_output_weights": False}
SHARDED = {"parallel.use_distributed_optimizer": True}
NO_SEQUENCE_PARALLEL = {"parallel.sequence_parallel": False}
RECOMPUTED = {
    "parallel.recompute_granularity": "full",
    "parallel.recompute_method": "uniform",
    "parallel.recompute_num_layers": 1,
}
RECOMPUTED_PARTS = {
    "parallel.recompute_granularity": "selective",
    "parallel.recompute_modules": ["core_attn", "mlp"],
}
RECOMPUTED_EXPERTS = {
    "parallel.recompute_granularity": "selective",
    "parallel.recompute_modules": ["moe"],
}
BF16 = {"training.bf16": True}
ALL_GATHER = {"model.moe_token_dispatcher_type": "allgather"}
LAYOUTS = {
    "TP 2": (
        2,
        {T: 2},
        {
            "polynorm": {},
            "gelu, tied": {"model.activation": "gelu"} | TIED,
            "norm of projections": {"model.qk_norm": "full"},
            "without sequence parallelism": NO_SEQUENCE_PARALLEL,
            "fixed order": {"model.activation_deterministic": True},
            "recomputed": RECOMPUTED,
            "recomputed parts": RECOMPUTED_PARTS,
            "experts, shared expert": EXPERTS | {"model.moe_shared_expert_intermediate_size": 24},
            "experts in bf16": EXPERTS | BF16,
            "polyrelu experts": EXPERTS | {"model.activation": "polyrelu"},
        },
    ),
    "EP 2": (
        2,
        {E: 2},
        {
            "experts": EXPERTS,
            "all-gather": EXPERTS | ALL_GATHER,
            "all-gather in bf16": EXPERTS | ALL_GATHER | BF16,
            "recomputed experts": EXPERTS | RECOMPUTED_EXPERTS,
        },
    ),
    "TP 2 x EP 2, whole experts": (4, {T: 2, E: 2, ET: 1}, {"sharded": EXPERTS | SHARDED}),
    "PP 2": (2, {P: 2}, {"untied": {}, "tied": TIED}),
    "PP 2, interleaved": (2, {P: 2}, {"untied": INTERLEAVED}),
    "CP 2, exchanged heads": (2, {C: 2, "parallel.cp_comm_type": "a2a"}, {"dense": {}}),
    "DP 2": (2, {}, {"dense": {}, "sharded": SHARDED, "sharded experts": EXPERTS | SHARDED}),
}
CASES = [(layout, model) for layout, (_, _, models) in LAYOUTS.items() for model in models]


@functools.cache
def configs_of(layout):
    _, options, models = LAYOUTS[layout]
    return {name: small_model(options | model) for name, model in models.items()}


@functools.cache
def sent(layout):
    return run_on_ranks(messages_of_rank, LAYOUTS[layout][0], configs_of(layout))


@pytest.mark.parametrize(("layout", "model"), CASES)
def test_bytes_of_every_kind_of_message(layout, model):
    config, num_ranks = configs_of(layout)[model], LAYOUTS[layout][0]
    stages = config.parallel.pipeline_model_parallel_size
    for stage in range(stages):
        planned = collections.Counter()
        for message in collectives(config, num_ranks, A100, stage):
            planned[message.kind] += message.size * message.calls
        found = sent(layout)[stage * num_ranks // stages][model]
        # Numbers of rows, the gradient norm and the like, of which a plan does not know; routing,
        # which is not as balanced as planned; padding of buckets.
        few = 1000
        for kind in planned.keys() | found.keys():
            routed = config.model.num_moe_experts and kind != "send"
            tolerance = max(few, (0.03 if routed else 0.0) * planned[kind])
            assert found.get(kind, 0) == pytest.approx(planned[kind], abs=tolerance), kind


def test_interleaving_needs_no_more_than_its_chunks():
    config = configs_of("PP 2, interleaved")["untied"]
    (forward, backward) = (
        [m for m in collectives(config, 2, A100, stage) if m.kind == "send"] for stage in (0, 1)
    )
    # 4 micro-batches: from stage 0 both chunks go on, from stage 1 the first; gradients likewise.
    assert [message.calls for message in forward] == [8, 4]
    assert [message.calls for message in backward] == [4, 8]
