"""The bound on a step's time, by numbers that can be worked out by hand."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from megapoly.config.parsing import load_yaml
from megapoly.config.resolve import resolve
from megapoly.platform.gpus import GPUS
from megapoly.platform.machine import Machine
from megapoly.preflight.planning.plan import Plan
from megapoly.preflight.planning.step_time import pipeline_bound
from megapoly.training.flops import forward_flops_per_token

RECIPES = Path(__file__).parents[3] / "examples" / "configs"
A100 = GPUS["a100-80g"]


def plan_of(recipe, world_size, **parallel):
    config = load_yaml(RECIPES / f"{recipe}.yaml")
    for name, value in parallel.items():
        setattr(config.parallel, name, value)
    config = resolve(config, tokenizer_vocab_size=0, machine=Machine(cuda=True))
    return Plan(config, world_size, A100)


def test_products_run_at_the_peak():
    step = plan_of("dense_1b_paper", 32).step
    # 6 operations a multiply-add and parameter but for the embedding, norms and coefficients, and
    # 6 s h for half of attention's two products of each layer.
    matrices = 1_345_423_456 - 65_536_000 - (2 * 24 + 1) * 2048 - 24 * 4
    per_token = 6 * matrices + 24 * 6 * 4096 * 2048
    assert step.products == pytest.approx(2 * 4096 * per_token / 312e12)
    assert step.flops == per_token * 64 * 4096
    assert step.mfu == pytest.approx(step.products / step.total)
    assert step.messages == step.bubble == step.data_parallel == 0.0


def test_recomputation_is_time_and_no_model_flops():
    given = plan_of("dense_1b_paper", 32).step
    full = dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    recomputed = plan_of("dense_1b_paper", 32, **full).step
    layers = forward_flops_per_token(plan_of("dense_1b_paper", 32).config).layers
    assert recomputed.flops == given.flops
    assert recomputed.products - given.products == pytest.approx(8192 * layers / 312e12)
    assert recomputed.mfu < given.mfu


def test_gradients_that_overlap_hide_behind_a_micro_batch():
    hidden = plan_of("dense_1b_paper", 32).step
    waited = plan_of(
        "dense_1b_paper", 32, overlap_grad_reduce=False, overlap_param_gather=False
    ).step
    # 6 bytes a parameter go to a node's 8 ranks from the 3 others, by 8 adapters of 25 GB/s; the
    # way inside a node, 7/8 of them at 300 GB/s, is shorter.
    expected = 6 * 1_345_423_456 * 3 / 4 / 8 / 25e9
    assert expected > 6 * 1_345_423_456 * 7 / 8 / 300e9
    assert waited.data_parallel == pytest.approx(expected)
    assert waited.total - hidden.total == pytest.approx(expected)


def test_a_pipeline_waits_for_its_ends():
    step = plan_of("dense_1b_paper", 32, pipeline_model_parallel_size=4).step
    layers = 3 * forward_flops_per_token(plan_of("dense_1b_paper", 32).config).layers / 4
    output = 3 * forward_flops_per_token(plan_of("dense_1b_paper", 32).config).output_layer
    # 4 micro-batches of the last, slowest stage, and one of each of the three others.
    assert step.products == pytest.approx(4 * 8192 * (layers + output) / 312e12)
    assert step.bubble > 3 * 8192 * layers / 312e12
    interleaved = plan_of(
        "dense_1b_paper",
        32,
        pipeline_model_parallel_size=4,
        virtual_pipeline_model_parallel_size=2,
    ).step
    assert interleaved.bubble < 0.6 * step.bubble


def one_forward_one_backward(stages, batches):
    """Seconds of the schedule with stages' seconds of one micro-batch, a third of them forward."""
    done, clocks = {}, [0.0] * len(stages)
    orders = []
    for i in range(len(stages)):
        warm_up = min(len(stages) - 1 - i, batches)
        order = [("forward", batch) for batch in range(warm_up)]
        for batch in range(batches - warm_up):
            order += [("forward", batch + warm_up), ("backward", batch)]
        orders.append(order + [("backward", batch) for batch in range(batches - warm_up, batches)])
    while any(orders):
        for i, order in enumerate(orders):
            while order:
                way, batch = order[0]
                other = i - 1 if way == "forward" else i + 1
                needed = (way, batch, other) if 0 <= other < len(stages) else ("forward", batch, i)
                if (i, way) != (0, "forward") and needed not in done:
                    break
                clocks[i] = max(clocks[i], done.get(needed, 0.0))
                clocks[i] += stages[i] * (1 if way == "forward" else 2) / 3
                done[(way, batch, i)] = clocks[i]
                order.pop(0)
    return max(clocks)


@pytest.mark.parametrize("batches", [1, 2, 4, 9])
@pytest.mark.parametrize("stages", [(1, 1, 1, 1), (1, 1, 3), (5, 1, 1, 1), (2, 3, 1), (1, 4, 2, 3)])
def test_no_schedule_is_faster_than_the_bound(stages, batches):
    slowest, waiting = pipeline_bound(stages, batches)
    bound, took = batches * stages[slowest] + waiting, one_forward_one_backward(stages, batches)
    assert bound <= took * (1 + 1e-9)
    if max(stages) == stages[-1]:
        assert bound == pytest.approx(took)


def test_operators_of_experts():
    # Elements of a token: norms and residual sums; rotation, QK-norm; of 8 experts the activation,
    # rows copied, sorted, sorted back, and added up; final norm. Then logits, and gradients.
    layer = 18 * 2048 + (4 + 5) * 2 * 2048 + 8 * 5 * 1536 + (4 * (8 + 1) + 8 * 8) * 2048
    token = 2 * (16 * layer + 5 * 2048) + 50_304 * (2 * 2 + 4 * 4)
    plan = plan_of("moe_7b_paper", 64)
    gradients = plan.counts[0].total * (2 + 8)
    expected = (8192 * token + gradients) / 2039e9
    assert plan.step.operators == pytest.approx(8 * expected)
    plan.config.training.gradient_accumulation_fusion = True
    fused = Plan(plan.config, 64, A100).step.operators
    assert plan.step.operators - fused == pytest.approx(8 * gradients / 2039e9)


def test_days_follow_from_tokens():
    plan = plan_of("moe_7b_paper", 64)
    assert plan.train_tokens == 47_684 * 4_194_304
    assert plan.days == pytest.approx(47_684 * plan.step.total / 86_400)


def test_fp8_speeds_up_the_linear_maps_alone():
    given, gpu = plan_of("dense_1b_paper", 32).config, GPUS["h100-80g"]
    in_fp8 = dataclasses.replace(given, training=dataclasses.replace(given.training, fp8="hybrid"))
    forward = forward_flops_per_token(given)
    rest = forward.attention_scores + forward.output_layer
    expected = 3 * 8192 * ((forward.total - rest) / 1979e12 + rest / 989.5e12)
    assert Plan(in_fp8, 32, gpu).step.products == pytest.approx(expected)
    parallel = dataclasses.replace(given.parallel, recompute_granularity="selective")
    recomputed = Plan(dataclasses.replace(in_fp8, parallel=parallel), 32, gpu).step.products
    assert recomputed - expected == pytest.approx(8192 * forward.attention_scores / 989.5e12)
    # 24 layers of 4 h h + 2 h 8256, twice in a byte.
    copies = 2 * 24 * (4 * 2048**2 + 2 * 2048 * 8256)
    weights = [Plan(config, 32, gpu).memory[0].weights for config in (given, in_fp8)]
    assert weights[1] - weights[0] == copies
