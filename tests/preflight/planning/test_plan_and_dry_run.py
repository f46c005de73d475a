"""The memory that is planned is the memory of ranks that were built."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from megapoly.config import load_yaml
from megapoly.config.parsing import override
from megapoly.platform.device import select_platform
from megapoly.platform.gpus import GPUS
from megapoly.platform.machine import Machine
from megapoly.preflight.planning.plan import Plan
from megapoly.testing import run_on_ranks

RECIPES = Path(__file__).parents[3] / "examples" / "configs"
A100 = GPUS["a100-80g"]
P = "--parallel."
TP2, PP2, PP4 = (
    [P + "tensor_model_parallel_size", "2"],
    [P + "pipeline_model_parallel_size", "2"],
    [P + "pipeline_model_parallel_size", "4"],
)
CP2 = [P + "context_parallel_size", "2"]
EXCHANGE = [*CP2, P + "cp_comm_type", "a2a"]
WHOLE_EXPERTS = [P + "expert_tensor_parallel_size", "1"]
INTERLEAVED = [*PP4, P + "virtual_pipeline_model_parallel_size", "2"]


def recompute(granularity, *values):
    names = ("method", "num_layers") if granularity == "full" else ("modules",)
    words = [P + "recompute_granularity", granularity]
    for name, value in zip(names, values, strict=False):
        words += [f"{P}recompute_{name}", value]
    return words


CASES = {
    "dense": ("dense_1b_paper", 32, []),
    "TP 2, PP 4": ("dense_1b_paper", 32, [*TP2, *PP4]),
    "interleaved, recomputed": (
        "dense_1b_paper",
        32,
        [*INTERLEAVED, *recompute("full", "uniform", "1")],
    ),
    "PP 2, some layers recomputed, swiglu": (
        "dense_1b_paper",
        32,
        [*PP2, *recompute("full", "block", "4"), "--model.activation", "swiglu"],
    ),
    "core and FFN recomputed, grouped queries, norms": (
        "dense_1b_paper",
        32,
        [
            *recompute("selective", "[core_attn, mlp]"),
            *["--model.qk_norm", "full", "--model.num_query_groups", "4"],
        ],
    ),
    "CP 2, TP 2, dropout": ("dense_1b_paper", 32, [*CP2, *TP2, "--model.hidden_dropout", "0.1"]),
    "CP 2, heads exchanged, core recomputed": (
        "dense_1b_paper",
        32,
        [*EXCHANGE, *recompute("selective")],
    ),
    "experts": ("moe_7b_paper", 64, []),
    "experts recomputed, TP 2, PP 2": (
        "moe_7b_paper",
        64,
        [*TP2, *PP2, *WHOLE_EXPERTS, *recompute("selective", "[moe]")],
    ),
}


def dry_runs():
    select_platform("cpu")
    from megapoly.preflight.planning.dry_run import dry_run

    machine = Machine(cuda=True, compute_capability=A100.compute_capability)
    found = {}
    for name, (recipe, world_size, words) in CASES.items():
        config = load_yaml(RECIPES / f"{recipe}.yaml")
        override(config, words)
        found[name] = dry_run(config, world_size, machine)
    return found


@functools.cache
def built():
    return run_on_ranks(dry_runs, 1)[0]


@pytest.mark.parametrize("name", CASES)
def test_memory_of_every_distinct_rank(name):
    found = built()[name]
    plan = Plan(found.config, found.world_size, A100)
    assert found.problems == ()
    for rank in found.classes:
        memory, counts = (x[rank.coordinates.pp] for x in (plan.memory, plan.counts))
        assert (counts.dense, counts.routed) == (rank.dense_parameters, rank.expert_parameters)
        # Buffers are padded.
        assert memory.weights == pytest.approx(rank.weight_bytes, rel=1e-4)
        assert memory.gradients == pytest.approx(rank.gradient_bytes, rel=1e-4)
        assert memory.optimizer == pytest.approx(rank.optimizer_bytes, rel=1e-4)
        # Of routing a few numbers a token and expert are kept that the plan leaves out.
        assert memory.activations == pytest.approx(rank.activation_bytes, rel=1e-2)
        # An estimate.
        assert 0.97 < memory.temporary / rank.passing_bytes < 1.3
        assert memory.total == pytest.approx(rank.total_bytes, rel=0.02)
        places = plan.grid.coordinates(rank.first_rank)
        assert places == {axis: getattr(rank.coordinates, axis) for axis in places}
