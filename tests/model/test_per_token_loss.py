"""The mean over a step's unmasked tokens is the same at every micro-batch size and layout."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
from layouts import EXPERTS, random_batches, small_config
from megatron.core.transformer.moe.moe_utils import get_moe_layer_wise_logging_tracker
from torch import Tensor

from megapoly.platform.device import select_platform
from megapoly.preflight.parallel_check.whole_model import (
    ParameterShard,
    assemble,
    gradient_shards,
    weight_shards,
)
from megapoly.testing import run_on_ranks
from megapoly.training.distributed import process_groups
from megapoly.training.state import build_state
from megapoly.training.step import compute_gradients, update_parameters

MASKED = {
    "data.eod_mask_loss": True,
    "training.global_batch_size": 8,
    "training.train_iters": 2,
    "optimizer.lr": 1e-3,
}
NO_BALANCING = {"model.moe_aux_loss_coeff": 0.0}
# The load-balancing loss depends on the micro-batch by its definition, the z-loss does not.
MODELS = {
    "dense": {"model.activation": "polyrelu", "model.num_query_groups": 2},
    "experts": EXPERTS | NO_BALANCING | {"model.moe_z_loss_coeff": 0.1},
    "experts, balanced": EXPERTS | {"model.moe_aux_loss_coeff": 0.5, "model.moe_z_loss_coeff": 0.1},
    "experts, no router loss": EXPERTS | NO_BALANCING | {"model.moe_z_loss_coeff": 0.0},
}
MICRO, PER_TOKEN = "training.micro_batch_size", "training.calculate_per_token_loss"
MEAN_OF_MEANS = {PER_TOKEN: False}
# All tokens of a step in one micro-batch: its mean is the right one without the option.
WHOLE = MEAN_OF_MEANS | {MICRO: 8}

T, E, ET, P = (
    f"parallel.{kind}_parallel_size"
    for kind in ("tensor_model", "expert_model", "expert_tensor", "pipeline_model")
)
V, C = "parallel.virtual_pipeline_model_parallel_size", "parallel.context_parallel_size"
GATHERED = {"parallel.cp_comm_type": "all_gather"}
SHARDED = {
    "parallel.use_distributed_optimizer": True,
    "parallel.overlap_grad_reduce": True,
    "parallel.overlap_param_gather": True,
}
# Enough layers for two chunks on each of two pipeline stages.
MODELS |= {
    f"{name}, 4 layers": MODELS[name] | {"model.num_layers": 4} for name in ("dense", "experts")
}
ROUTED = ["experts", "experts, balanced"]
LAYOUTS = {
    "DP 2, distributed optimizer": (2, SHARDED, ["dense"]),
    "TP 2 x EP 2, whole experts": (2, {T: 2, E: 2, ET: 1}, ROUTED),
    "PP 2": (2, {P: 2}, ["dense", *ROUTED]),
    "CP 2": (2, {C: 2} | GATHERED, ["dense", *ROUTED]),
}
MORE_LAYOUTS = {
    "TP 2": (2, {T: 2}, ["dense", *ROUTED]),
    "TP 2 without sequence parallelism": (
        2,
        {T: 2, "parallel.sequence_parallel": False},
        ["dense"],
    ),
    "EP 2, distributed optimizer": (2, {E: 2} | SHARDED, ROUTED),
    "PP 2, interleaved, DP 2": (
        4,
        {P: 2, V: 2} | SHARDED,
        ["dense, 4 layers", "experts, 4 layers"],
    ),
    "CP 2 x TP 2": (4, {T: 2, C: 2} | GATHERED, ["dense", *ROUTED]),
    "TP 2 x EP 2, DP 2": (4, {T: 2, E: 2, ET: 1} | SHARDED, ROUTED),
}
CASES = [
    *((layout, model) for layout, (_, _, models) in LAYOUTS.items() for model in models),
    *(
        pytest.param(layout, model, marks=pytest.mark.slow)
        for layout, (_, _, models) in MORE_LAYOUTS.items()
        for model in models
    ),
]


@dataclasses.dataclass
class Trained:
    """A model after two steps: whole weights, the gradients of each step, and what was reported."""

    weights: dict[str, Tensor]
    gradients: list[dict[str, Tensor]]
    losses: list[dict[str, float]]
    micro_batches: list[list[tuple[float, float]]]  # sum and number of tokens, on one process


def train_on_rank(
    configs: dict[str, Any],
) -> dict[str, tuple[list[ParameterShard], list[Any]]]:
    """Train every model two steps; every process of the job calls this."""
    platform = select_platform("cpu")
    resolved = {name: small_config(options) for name, options in configs.items()}
    with process_groups(next(iter(resolved.values())), platform):
        results = {}
        for name, config in resolved.items():
            get_moe_layer_wise_logging_tracker().clear()  # has the losses of the last model
            state = build_state(config, platform, corpus=None)
            steps = []
            for i in range(2):
                losses = compute_gradients(state, random_batches(config, state.layout, step=i))
                gradients = gradient_shards(state.chunks)
                result = update_parameters(state, losses)
                counted = [(float(loss["sum"]), float(loss["num_tokens"])) for loss in losses]
                reported = {"lm_loss": result.lm_loss, "grad_norm": result.grad_norm}
                steps.append((gradients, reported | result.aux_losses, counted))
            # With overlapped gathering the weights of other ranks are those before the step.
            if config.parallel.overlap_param_gather:
                for chunk in state.chunks:
                    chunk.start_param_sync(force_sync=True)
            results[name] = (weight_shards(state.chunks), steps)
        return results


def train(models: dict[str, dict[str, Any]], num_ranks: int) -> dict[str, Trained]:
    ranks = run_on_ranks(train_on_rank, num_ranks, models)
    trained = {}
    for name in models:
        weights = assemble(shard for rank in ranks for shard in rank[name][0])
        steps = list(zip(*(rank[name][1] for rank in ranks), strict=True))
        gradients = [assemble(shard for rank in step for shard in rank[0]) for step in steps]
        assert not weights.disagreements
        assert not any(gradient.disagreements for gradient in gradients)
        trained[name] = Trained(
            weights.tensors,
            [gradient.tensors for gradient in gradients],
            [step[0][1] for step in steps],
            [step[0][2] for step in steps],
        )
    return trained


@functools.cache
def one_process():
    models = {name: WHOLE | options for name, options in MODELS.items() if "layers" not in name}
    for name in ("dense", "experts"):
        models |= {f"{name}, micro-batches of {n}": MODELS[name] | {MICRO: n} for n in (1, 2)}
    for name in ("experts, balanced", "experts, no router loss"):
        models[f"{name}, mean of means"] = MODELS[name] | MEAN_OF_MEANS
        models[f"{name}, micro-batches of 1"] = MODELS[name]
    models["dense, mean of means"] = MODELS["dense"] | MEAN_OF_MEANS
    return train({name: MASKED | options for name, options in models.items()}, 1)


@functools.cache
def deep_on_one_process():
    models = {name: MASKED | WHOLE | o for name, o in MODELS.items() if "layers" in name}
    return train(models, 1)


@functools.cache
def at_layout(layout):
    num_ranks, options, names = (LAYOUTS | MORE_LAYOUTS)[layout]
    return train({name: MASKED | MODELS[name] | options for name in names}, num_ranks)


def assert_same(actual: Trained, expected: Trained) -> None:
    for a, e in zip(actual.gradients, expected.gradients, strict=True):
        assert a.keys() == e.keys()
        errors = {key: ((a[key] - g).norm() / g.norm()).item() for key, g in e.items() if g.any()}
        assert {key: error for key, error in errors.items() if not error < 2e-5} == {}
    for key, weight in expected.weights.items():
        # Adam divides by the gradient's size: where that is rounding, a step of 1e-3 is too.
        assert (actual.weights[key] - weight).norm() < 1e-4 * weight.norm(), key
    for a, e in zip(actual.losses, expected.losses, strict=True):
        assert a == pytest.approx(e, rel=1e-5)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("model", ["dense", "experts"])
def test_micro_batches_do_not_change_training(model, size):
    assert_same(one_process()[f"{model}, micro-batches of {size}"], one_process()[model])


@pytest.mark.parametrize(("layout", "model"), CASES)
def test_layouts_train_as_one_process(layout, model):
    references = deep_on_one_process() if "layers" in model else one_process()
    micro = ", micro-batches of 1" if model == "experts, balanced" else ""
    assert_same(at_layout(layout)[model], references[model + micro])


def test_reported_loss_is_the_mean_that_is_trained_on():
    for name, mean in (
        ("dense, micro-batches of 1", lambda sums, counts: sum(sums) / sum(counts)),
        (
            "dense, mean of means",
            lambda sums, counts: sum(s / max(c, 1) for s, c in zip(sums, counts, strict=True)) / 8,
        ),
    ):
        trained = one_process()[name]
        for reported, counted in zip(trained.losses, trained.micro_batches, strict=True):
            sums, counts = zip(*counted, strict=True)
            assert 0 in counts
            assert reported["lm_loss"] == pytest.approx(mean(sums, counts), rel=1e-6)
    first, second = (
        one_process()[f"dense, {name}"].losses[0]["lm_loss"]
        for name in ("micro-batches of 1", "mean of means")
    )
    assert abs(first - second) > 0.1


def test_router_losses_weigh_the_same_in_both_means():
    """What they add to a gradient does not depend on how many tokens are masked."""

    def added(mean):
        with_losses, without = (
            one_process()[f"{name}, {mean}"].gradients[0]
            for name in ("experts, balanced", "experts, no router loss")
        )
        return {key: with_losses[key] - without[key] for key in without}

    expected, actual = added("mean of means"), added("micro-batches of 1")
    for key, gradient in expected.items():
        if key.endswith("router.weight"):
            assert gradient.norm() > 1e-3
            assert (actual[key] - gradient).norm() < 1e-4 * gradient.norm(), key


def masked_step():
    config = small_config(MASKED | MODELS["dense"] | {"training.global_batch_size": 2})
    platform = select_platform("cpu")
    with process_groups(config, platform):
        state = build_state(config, platform, corpus=None)
        batches = list(random_batches(config, state.layout))
        for batch in batches:
            batch["loss_mask"].zero_()
        try:
            compute_gradients(state, iter(batches))
        except Exception as error:
            return type(error).__name__, str(error)
    return None


def test_a_step_without_unmasked_tokens_is_refused():
    for name, message in run_on_ranks(masked_step, 2):
        assert name == "DataError"
        assert "`data.eod_mask_loss` to false" in message
