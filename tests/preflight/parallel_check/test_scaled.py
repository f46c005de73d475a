"""Small copies keep the kind of the model and what its sizes divide by."""

import dataclasses
from math import gcd

import pytest

from megapoly.config import load_yaml
from megapoly.config.rules import find_problems
from megapoly.platform.machine import CPU
from megapoly.preflight.layouts import parse_layout
from megapoly.preflight.parallel_check.scaled import scaled_down
from megapoly.testing.jobs import RECIPES

SIZES = {
    "num_layers": 4,
    "num_attention_heads": 8,
    "ffn_hidden_size": 24,
    "moe_ffn_hidden_size": 24,
    "moe_shared_expert_intermediate_size": 24,
}
SAME = (
    "activation",
    "activation_coefficients",
    "qk_norm",
    "init_method",
    "moe_router_pre_softmax",
    "moe_aux_loss_coeff",
    "moe_z_loss_coeff",
    "moe_token_dispatcher_type",
    "make_vocab_size_divisible_by",
    "untie_embeddings_and_output_weights",
)
NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml"))


@pytest.mark.parametrize("recipe", NAMES)
def test_recipes_scale_down(recipe):
    config = load_yaml(RECIPES / f"{recipe}.yaml")
    untouched = dataclasses.asdict(config)
    small = scaled_down(config, steps=3, bf16=False)
    assert dataclasses.asdict(config) == untouched
    given, model = config.model, small.model
    for name in SAME:
        assert getattr(model, name) == getattr(given, name)
    for name, divisor in SIZES.items():
        size, original = getattr(model, name), getattr(given, name)
        if original is not None and name != "ffn_hidden_size":
            assert gcd(size, divisor) == gcd(original, divisor) and size <= 200
    assert model.hidden_size == model.num_attention_heads * model.kv_channels
    activations_in, activations_out = (
        std * std * width
        for std, width in (
            (given.init_method_std, given.hidden_size),
            (model.init_method_std, model.hidden_size),
        )
    )
    assert activations_in == pytest.approx(activations_out)
    for name, processes in {"1": 1, "tp2-pp2-vpp2": 4, "cp4-dp2-distopt": 8, "pp4": 4}.items():
        problems = find_problems(
            parse_layout(name).applied_to(small),
            world_size=processes,
            machine=CPU,
        )
        assert problems == []


def test_masked_tokens_and_their_mean_are_the_configurations():
    config = load_yaml(RECIPES / "moe_7b_released.yaml")
    assert not scaled_down(config, steps=1, bf16=False).training.calculate_per_token_loss
    config.data.eod_mask_loss = True
    small = scaled_down(config, steps=1, bf16=False)
    assert small.data.eod_mask_loss and small.training.calculate_per_token_loss
    config.training.calculate_per_token_loss = False
    assert not scaled_down(config, steps=1, bf16=False).training.calculate_per_token_loss


def test_odd_sizes_stay_odd():
    config = load_yaml(RECIPES / "dense_tiny.yaml")
    model = config.model
    model.num_attention_heads, model.num_query_groups, model.vocab_size = 12, 3, 50_279
    model.num_layers, model.ffn_hidden_size = 6, 1000
    config.parallel.recompute_granularity, config.parallel.recompute_method = "full", "block"
    config.parallel.recompute_num_layers = 5
    small = scaled_down(config, steps=1, bf16=True)
    assert (small.model.num_attention_heads, small.model.num_query_groups) == (12, 3)
    assert small.model.num_layers == 6 and small.model.ffn_hidden_size % 8 == 0
    assert small.model.vocab_size == 4103  # 7 more than a multiple of 8, as 50,279
    assert small.parallel.recompute_method == "block" and small.parallel.recompute_num_layers == 1
    assert small.training.bf16
