"""Coefficients of router losses mean the same loss in the engine and in transformers."""

import pytest
import torch
from megatron.core.transformer.moe.moe_utils import switch_load_balancing_loss_func
from transformers.models.olmoe.modeling_olmoe import load_balancing_loss_func

from megapoly.config import ModelConfig
from megapoly.conversion.architecture import hf_config, model_config
from megapoly.conversion.remote_code.modeling_megapoly import load_balancing_loss
from megapoly.conversion.transformers_classes import config_and_model_class

EXPERTS, TOKENS = 8, 40


def moe(activation, num_layers, topk, **changes):
    return ModelConfig(
        num_layers=num_layers,
        hidden_size=48,
        num_attention_heads=4,
        num_query_groups=4,
        kv_channels=12,
        vocab_size=99,
        activation=activation,
        qk_norm="full",
        scale_gated_ffn=False,
        num_moe_experts=EXPERTS,
        moe_ffn_hidden_size=24,
        moe_router_topk=topk,
        **changes,
    )


def exported(model):
    return hf_config(model, seq_length=16, dtype="float32", bos=None, eos=0, pad=None)


def loss_of_engine(model, layers):
    """The sum over layers, as each layer's router adds its own."""
    total = torch.zeros(())
    for logits in layers:
        probs = logits.softmax(-1)
        chosen = probs.topk(model.moe_router_topk).indices
        counts = torch.bincount(chosen.flatten(), minlength=EXPERTS)
        total += switch_load_balancing_loss_func(
            probs, counts, TOKENS, model.moe_router_topk, EXPERTS, model.moe_aux_loss_coeff
        )
    return total.item()


@pytest.mark.parametrize(("num_layers", "topk"), [(1, 1), (3, 2), (16, 8)])
@pytest.mark.parametrize("coefficient", [0.0, 0.01])
def test_olmoe(num_layers, topk, coefficient):
    """On one router output in every layer; transformers averages layers before it multiplies."""
    model = moe("swiglu", num_layers, topk, moe_aux_loss_coeff=coefficient)
    layers = [torch.randn(TOKENS, EXPERTS, generator=torch.Generator().manual_seed(0))] * num_layers
    config = exported(model)
    assert config["model_type"] == "olmoe"
    found = load_balancing_loss_func(tuple(layers), EXPERTS, topk) * config["router_aux_loss_coef"]
    assert found.item() == pytest.approx(loss_of_engine(model, layers), rel=1e-5)
    assert model_config(config, source="").moe_aux_loss_coeff == coefficient


@pytest.mark.parametrize(("num_layers", "topk"), [(1, 1), (3, 2), (6, 4)])
@pytest.mark.parametrize("coefficient", [0.0, 0.01])
def test_own_code(num_layers, topk, coefficient):
    """On another router output in each layer."""
    model = moe("polynorm", num_layers, topk, moe_aux_loss_coeff=coefficient)
    layers = list(
        torch.randn(num_layers, TOKENS, EXPERTS, generator=torch.Generator().manual_seed(1))
    )
    config = exported(model)
    assert config["model_type"] == "megapoly"
    settings = config_and_model_class(config)[0]
    found = load_balancing_loss(layers, settings) * settings.router_aux_loss_coef
    assert found.item() == pytest.approx(loss_of_engine(model, layers), rel=1e-5)
    assert model_config(config, source="").moe_aux_loss_coeff == coefficient


@pytest.mark.parametrize("activation", ["swiglu", "polynorm"])
def test_z_loss_is_kept(activation):
    for z_loss in (0.0, 0.003):
        config = exported(moe(activation, 2, 2, moe_z_loss_coeff=z_loss))
        assert model_config(config, source="").moe_z_loss_coeff == z_loss


def test_without_a_z_loss_in_its_config_an_olmoe_trains_without():
    config = exported(moe("swiglu", 2, 2))
    del config["router_z_loss_coef"]
    assert model_config(config, source="").moe_z_loss_coeff == 0.0


def test_the_default_coefficient_is_that_of_transformers():
    config = exported(moe("swiglu", 4, 2))
    given = model_config(config | {"router_aux_loss_coef": 0.01}, source="").moe_aux_loss_coeff
    del config["router_aux_loss_coef"]
    assert model_config(config, source="").moe_aux_loss_coeff == given == 0.005
