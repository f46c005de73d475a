"""Parameters that are planned are those that are built."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_models import EXPERTS, small_model

from megapoly.config.parsing import load_yaml
from megapoly.config.resolve import resolve
from megapoly.model.builder import gpt_model
from megapoly.model.parameters import count_parameters
from megapoly.model.transformer_config import transformer_config
from megapoly.platform.device import select_platform
from megapoly.platform.machine import Machine
from megapoly.preflight.planning.parameters import (
    active_parameters,
    counts_of_rank,
    model_parts,
    total_parameters,
)
from megapoly.training.distributed import process_groups

RECIPES = Path(__file__).parents[3] / "examples" / "configs"
MODELS = {
    "polynorm": {},
    "swiglu, grouped queries": {"model.activation": "swiglu", "model.num_query_groups": 2},
    "polyprelu of order 4, tied": {
        "model.activation": "polyprelu",
        "model.activation_order": 4,
        "model.untie_embeddings_and_output_weights": False,
    },
    "head norms, narrow heads": {"model.qk_norm": "head", "model.kv_channels": 8},
    "full norms": {"model.qk_norm": "full", "model.num_query_groups": 2},
    "experts": EXPERTS,
    "gated experts with coefficients": EXPERTS
    | {"model.activation": "gated_polynorm", "model.activation_coefficients": "per_expert"},
    "experts, shared expert": EXPERTS | {"model.moe_shared_expert_intermediate_size": 24},
}


@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_the_model_has_as_many_parameters(options):
    config = small_model(options)
    with process_groups(config, select_platform("cpu"), alone=True), torch.device("meta"):
        built = count_parameters(gpt_model(config, transformer_config(config, on_cpu=True)))
    assert (total_parameters(config), active_parameters(config)) == built
    assert sum(part.total for part in model_parts(config)) == built.total
    assert counts_of_rank(config, 0).total == built.total


@pytest.mark.parametrize(
    ("recipe", "total", "active"),
    [
        ("dense_1b_paper", 1_345_423_456, 1_345_423_456),
        ("moe_7b_paper", 6_919_161_920, 1_282_017_344),
    ],
)
def test_the_papers_models(recipe, total, active):
    config = load_yaml(RECIPES / f"{recipe}.yaml")
    config = resolve(config, tokenizer_vocab_size=0, machine=Machine(cuda=True))
    assert (total_parameters(config), active_parameters(config)) == (total, active)
