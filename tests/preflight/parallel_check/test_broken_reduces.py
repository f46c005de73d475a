"""The check notices when any one reduction is missing.

Every case takes one out of all ranks, at a layout that needs it.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import pytest
import torch

from megapoly.config import load_yaml
from megapoly.model import experts, norms
from megapoly.model.ffn_activation import FFNActivation
from megapoly.ops import collectives, polynorm_registration, polyrelu_registration
from megapoly.preflight.layouts import parse_layout
from megapoly.preflight.parallel_check import job
from megapoly.preflight.parallel_check.comparison import FP32, compare
from megapoly.preflight.parallel_check.scaled import scaled_down
from megapoly.testing.jobs import RECIPES, shared_cache
from megapoly.training import optimizer


class LocalSum:
    """In place of `PendingSum`: this rank's part alone."""

    def __init__(self, part: torch.Tensor, group: str, *, deterministic: bool) -> None:
        self.part = part

    def wait(self) -> torch.Tensor:
        return self.part


def sums_of_this_rank(operators, caller):
    """Leave out the sums over ranks that one function of an operator's module makes."""

    def pending_sum(*args, **kwargs):
        is_caller = sys._getframe(1).f_code.co_name == caller
        return (LocalSum if is_caller else collectives.PendingSum)(*args, **kwargs)

    assert hasattr(operators, caller)
    operators.PendingSum = pending_sum


def forward_statistics():
    sums_of_this_rank(polynorm_registration, "polynorm_rsqrt")


def backward_sums():
    sums_of_this_rank(polynorm_registration, "polynorm_backward")


def coefficient_gradient_of_a_row():
    sums_of_this_rank(polyrelu_registration, "polyrelu_backward")


def coefficient_gradient_of_shared_sets():
    add = FFNActivation._add_coefficients

    def unmarked(self, *args):
        add(self, *args)
        for name in self.coefficient_names:
            getattr(self, name).sequence_parallel = False

    FFNActivation._add_coefficients = unmarked


def expert_group():
    mark = experts._mark_expert_weights

    def of_the_dense_group(module):
        mark(module)
        for weight in module.parameters():
            weight.allreduce = True

    experts._mark_expert_weights = of_the_dense_group


def expert_norm():
    optimizer._count_expert_gradients_once = lambda optimizer: None


def layer_norm_gradient():
    init = norms.RMSNorm.__init__

    def unmarked(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self.weight.sequence_parallel = False

    norms.RMSNorm.__init__ = unmarked


def broken_steps(break_it, config):
    if config.parallel.tensor_model_parallel_size > 1 or config.parallel.use_distributed_optimizer:
        break_it()
    return job.steps_of_rank(config)


PER_EXPERT = {"activation_coefficients": "per_expert"}
CASES = {
    # what is left out: recipe, options of the model, layout, what then differs
    forward_statistics: ("dense_tiny", {}, "tp2", "gradient replicas norm"),
    backward_sums: ("dense_tiny", {}, "tp2-nosp", "gradient replicas norm"),
    coefficient_gradient_of_a_row: (
        "dense_tiny",
        {"activation": "polyrelu"},
        "tp2",
        "gradient replicas norm",
    ),
    coefficient_gradient_of_shared_sets: ("moe_tiny", {}, "tp2-ep2-etp1", "gradient replicas norm"),
    expert_group: ("moe_tiny", {}, "ep2-dp2-distopt", "gradient norm"),
    expert_norm: ("moe_tiny", PER_EXPERT, "tp2-ep2-etp1", "norm"),
    layer_norm_gradient: ("dense_tiny", {}, "tp2", "gradient replicas norm"),
}


def small(recipe, options):
    config = load_yaml(RECIPES / f"{recipe}.yaml")
    for name, value in options.items():
        setattr(config.model, name, value)
    return scaled_down(config, steps=1, bf16=False)


def train(config, layout):
    return job.train_at(config, layout, cache_dir=Path(shared_cache().name), timeout_s=300)


@pytest.mark.parametrize("break_it", CASES, ids=lambda break_it: break_it.__name__)
def test_a_missing_reduction_is_noticed(monkeypatch, break_it):
    recipe, options, name, finding = CASES[break_it]
    config, layout = small(recipe, options), parse_layout(name)
    expected = train(config, parse_layout("1"))
    assert compare(train(config, layout), expected).is_within(FP32)
    monkeypatch.setattr(job, "steps_of_rank", functools.partial(broken_steps, break_it))
    found = compare(train(config, layout), expected)
    assert not found.is_within(FP32)
    assert (found.first_beyond(FP32) is not None) == ("gradient" in finding)
    assert bool(found.disagreements) == ("replicas" in finding)
    assert (found.grad_norm > FP32.grad_norm) == ("norm" in finding)
