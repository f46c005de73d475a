"""The recipes have the parameters that the paper's models have, to the digit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from layouts import EXPERTS, small_config

from megapoly.config import Config, load_yaml
from megapoly.config.resolve import resolve
from megapoly.config.schema import ParallelConfig
from megapoly.model.builder import gpt_model
from megapoly.model.parameters import count_parameters
from megapoly.model.transformer_config import transformer_config
from megapoly.platform.device import select_platform
from megapoly.platform.machine import CPU
from megapoly.testing import run_on_ranks
from megapoly.training.distributed import process_groups

RECIPES = Path(__file__).parents[2] / "examples" / "configs"
DENSE = 1_345_423_360
ROUTED, ROUTED_ACTIVE = 6_919_161_856, 1_282_017_280
# Recipe and activation: total, active. PolyNorm has four coefficients a layer.
COUNTS = {
    ("dense_1b_paper", "swiglu"): (DENSE, DENSE),
    ("dense_1b_paper", "polynorm"): (DENSE + 4 * 24, DENSE + 4 * 24),
    ("dense_1b_released", "swiglu"): (DENSE, DENSE),
    ("dense_1b_released", "polynorm"): (DENSE + 4 * 24, DENSE + 4 * 24),
    ("moe_7b_paper", "swiglu"): (ROUTED, ROUTED_ACTIVE),
    ("moe_7b_paper", "polynorm"): (ROUTED + 4 * 16, ROUTED_ACTIVE + 4 * 16),
    ("moe_7b_released", "swiglu"): (ROUTED, ROUTED_ACTIVE),
    ("moe_7b_released", "polynorm"): (ROUTED + 4 * 16, ROUTED_ACTIVE + 4 * 16),
}


def recipe(name: str, activation: str) -> Config:
    """A recipe for one process; its tokenizer is not on this machine."""
    config = load_yaml(RECIPES / f"{name}.yaml")
    config.parallel = ParallelConfig()
    config.model.activation = activation
    assert config.model.vocab_size is not None
    return resolve(config, tokenizer_vocab_size=0, machine=CPU)


def count(configs: list[Config]) -> list[tuple[int, int]]:
    with process_groups(configs[0], select_platform("cpu")), torch.device("meta"):
        return [
            count_parameters(gpt_model(config, transformer_config(config, on_cpu=True)))
            for config in configs
        ]


@pytest.fixture(scope="module")
def counts():
    return run_on_ranks(count, 1, [recipe(*case) for case in COUNTS])[0]


@pytest.mark.parametrize("case", COUNTS, ids=" ".join)
def test_recipe_counts(counts, case):
    assert counts[list(COUNTS).index(case)] == COUNTS[case]


def test_coefficients_per_expert_belong_to_their_experts():
    per_expert = EXPERTS | {"model.activation_coefficients": "per_expert"}
    configs = [small_config(EXPERTS), small_config(per_expert)]
    shared, own = run_on_ranks(count, 1, configs)[0]
    layers, experts, topk, coefficients = 2, 4, 2, 4
    assert own.total - shared.total == layers * (experts - 1) * coefficients
    assert own.active - shared.active == layers * (topk - 1) * coefficients
