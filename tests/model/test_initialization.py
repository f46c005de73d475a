"""Distribution of the initial weights; test_parallel_gradients.py tests them at all layouts."""

from __future__ import annotations

import pytest
import torch
from layouts import EXPERTS, run_models

STD = 0.3
SHARED_EXPERT = {"model.moe_shared_expert_intermediate_size": 24}
MODELS = {
    "normal": EXPERTS | SHARED_EXPERT | {"model.qk_norm": "full"},
    "again": EXPERTS | SHARED_EXPERT | {"model.qk_norm": "full"},
    "other seed": EXPERTS | SHARED_EXPERT | {"training.seed": 4321},
    "truncated": EXPERTS | {"model.init_method": "truncated_normal"},
    "unscaled": EXPERTS | {"model.scale_residual_init": False},
}
RESIDUAL = ("linear_proj.weight", "linear_fc2.weight")


@pytest.fixture(scope="module")
def weights():
    return {name: result.weights for name, result in run_models(MODELS, 1, {}).items()}


def matrices(weights):
    return {key: w for key, w in weights.items() if "norm" not in key and "activation" not in key}


def assert_std(weight, expected):
    """Within five standard errors."""
    assert weight.std().item() == pytest.approx(expected, rel=5 / (2 * weight.numel()) ** 0.5)


def test_seed_decides(weights):
    for key, weight in matrices(weights["normal"]).items():
        assert torch.equal(weights["again"][key], weight), key
        assert not torch.equal(weights["other seed"][key], weight), key


@pytest.mark.parametrize("name", ["normal", "unscaled", "truncated"])
def test_std(weights, name):
    for key, weight in matrices(weights[name]).items():
        scaled = key.endswith(RESIDUAL) and name != "unscaled"
        std = STD / (2 * 2) ** 0.5 if scaled else STD
        assert_std(weight, std * (0.98658 if name == "truncated" else 1.0))
    assert sum(key.endswith(RESIDUAL) for key in weights[name]) >= 2


def test_truncated_normal_is_cut_at_three_std(weights):
    def largest(weights):
        return max(
            (weight.abs().max() / (STD / 2 if key.endswith(RESIDUAL) else STD)).item()
            for key, weight in matrices(weights).items()
        )

    assert 2.9 < largest(weights["truncated"]) <= 3.0 < largest(weights["normal"])


def test_layers_and_experts_differ(weights):
    for key, weight in matrices(weights["normal"]).items():
        if ".layers." in key:
            assert not torch.equal(weight[0], weight[1]), key
        if ".experts.experts." in key:
            assert not torch.equal(weight[0, 0], weight[0, 1]), key


def test_norms_are_one(weights):
    norms = {key: weight for key, weight in weights["normal"].items() if "norm" in key}
    assert {"q_layernorm", "k_layernorm"} <= {key.split(".")[-2] for key in norms}
    for key, weight in norms.items():
        assert torch.equal(weight, torch.ones_like(weight)), key


def test_coefficients_are_the_registry_s(weights):
    keys = [key for key in weights["normal"] if "activation_func" in key]
    assert len(keys) == 2  # routed and shared experts
    for key in keys:
        torch.testing.assert_close(
            weights["normal"][key], torch.tensor([[0, 1 / 3, 1 / 3, 1 / 3]] * 2)
        )
