"""Wrong conversions of many kinds are noticed, and the module that is wrong is named."""

import pytest
import torch
from conversions import compare_broken

from megapoly.config import ModelConfig
from megapoly.conversion.architecture import hf_config
from megapoly.conversion.module_outputs import ModuleOutputs, expert_probe_rows
from megapoly.conversion.parity import (
    TOLERANCE,
    comparable_positions,
    differing_module,
    experts_not_reached,
    measure_parity,
    module_differences,
)
from megapoly.conversion.parity_check import far_positions
from megapoly.conversion.transformers_classes import config_and_model_class
from megapoly.conversion.transformers_outputs import transformers_module_outputs
from megapoly.testing import run_on_ranks


def layers(tensors, part):
    """Names of a part's tensor in every layer, in order."""
    return [f"model.layers.{i}.{part}" for i in range(4) if f"model.layers.{i}.{part}" in tensors]


def swap_q_and_k(tensors, config):
    q, k = (f"model.layers.1.self_attn.{n}_proj.weight" for n in "qk")
    tensors[q], tensors[k] = tensors[k], tensors[q]


def swap_k_and_v(tensors, config):
    k, v = (f"model.layers.1.self_attn.{n}_proj.weight" for n in "kv")
    tensors[k], tensors[v] = tensors[v], tensors[k]


def interleave_rotary_rows(tensors, config):
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[name] = tensors[name].view(4, 2, 6, 48).transpose(1, 2).reshape(48, 48)


def transpose_an_expert(tensors, config):
    name = "model.layers.2.mlp.experts.3.up_proj.weight"
    tensors[name] = tensors[name].T


def shift_layers(tensors, config):
    names = layers(tensors, "post_attention_layernorm.weight")
    values = [tensors[name] for name in names]
    for name, value in zip(names, values[1:] + values[:1], strict=True):
        tensors[name] = value


def shift_experts(tensors, config):
    names = [f"model.layers.1.mlp.experts.{i}.down_proj.weight" for i in range(8)]
    values = [tensors[name] for name in names]
    for name, value in zip(names, values[1:] + values[:1], strict=True):
        tensors[name] = value


def ascending_coefficients(tensors, config):
    for name in layers(tensors, "mlp.act_fn.weight"):
        tensors[name] = tensors[name].flip(0)


def no_constant(tensors, config):
    for name in layers(tensors, "mlp.act_fn.bias"):
        tensors[name] = torch.zeros(1)


def no_final_norm(tensors, config):
    tensors["model.norm.weight"] = torch.ones(48)


def norm_of_heads(tensors, config):
    name = "model.layers.0.self_attn.k_norm.weight"
    tensors[name] = tensors[name][:12].repeat(4)


def zero_expert(tensors, config):
    name = "model.layers.0.mlp.experts.0.up_proj.weight"
    tensors[name] = torch.zeros_like(tensors[name])


def drop_an_expert(tensors, config):
    del tensors["model.layers.3.mlp.experts.7.down_proj.weight"]


def reverse_router(tensors, config):
    name = "model.layers.1.mlp.gate.weight"
    tensors[name] = tensors[name].flip(0)


def tie_embeddings(tensors, config):
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()


def wrong_rope_theta(tensors, config):
    config["rope_theta"] = 500.0


def usual_eps(tensors, config):
    config["rms_norm_eps"] = 1e-6


def normalize_probabilities(tensors, config):
    config["norm_topk_prob"] = True


def swap_gate_and_up(tensors, config):
    for i in range(8):
        gate, up = (f"model.layers.0.mlp.experts.{i}.{n}_proj.weight" for n in ("gate", "up"))
        tensors[gate], tensors[up] = tensors[up], tensors[gate]


def coefficients_of_the_first_expert(tensors, config):
    for i in range(8):
        place = "model.layers.2.mlp.experts.{}.act_fn.weight"
        tensors[place.format(i)] = tensors[place.format(0)].clone()


def drop_shared_expert(tensors, config):
    name = "model.layers.1.mlp.shared_expert.down_proj.weight"
    tensors[name] = torch.zeros_like(tensors[name])


def destroy_an_expert_without_tokens(tensors, config):
    """Whatever the text, some expert of so many is not chosen by it; rows of its own reach it."""
    name = "model.layers.3.mlp.experts.4.down_proj.weight"
    tensors[name] = tensors[name] * 1.5


def change_a_rare_token(tensors, config):
    tensors["model.embed_tokens.weight"][4001] *= 1.01


def change_a_down_projection(tensors, config):
    tensors["model.layers.2.mlp.down_proj.weight"] *= 1.01


def swap_norms(tensors, config):
    a, b = (f"model.layers.1.{n}.weight" for n in ("input_layernorm", "post_attention_layernorm"))
    tensors[a], tensors[b] = tensors[b], tensors[a]


def groups_in_another_order(tensors, config):
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[name] = tensors[name].view(2, 2, 12, 48).transpose(0, 1).reshape(48, 48)


def change_a_matrix_a_little(tensors, config):
    """By less than a module may be off when the modules before it add rounding."""
    tensors["model.layers.1.self_attn.v_proj.weight"] *= 1 + 9e-5


def scale_positions_beyond_the_longest(tensors, config):
    config["rope_scaling"] = {"type": "dynamic", "factor": 2.0}


def scale_positions_beyond_a_few(tensors, config):
    scaling = {"rope_type": "longrope", "short_factor": [1.0] * 6, "long_factor": [2.0] * 6}
    config["rope_scaling"] = scaling | {
        "factor": 2.0,
        "attention_factor": 1.0,
        "original_max_position_embeddings": 64,
    }


# By the model: what is changed, and the module that is to be named.
BREAKS = {
    "moe": {
        swap_q_and_k: "model.layers.1.self_attn.q_norm",
        swap_k_and_v: "model.layers.1.self_attn.k_norm",
        interleave_rotary_rows: "model.layers.0.self_attn.q_norm",
        transpose_an_expert: "model.layers.2.mlp",
        shift_layers: "model.layers.0.post_attention_layernorm",
        shift_experts: "model.layers.1.mlp",
        ascending_coefficients: "model.layers.0.mlp",
        no_constant: "model.layers.0.mlp",
        no_final_norm: "model.norm",
        norm_of_heads: "model.layers.0.self_attn.k_norm",
        zero_expert: "model.layers.0.mlp",
        drop_an_expert: "model.layers.3.mlp",
        reverse_router: "model.layers.1.mlp",
        tie_embeddings: "lm_head",
        wrong_rope_theta: "model.layers.0.self_attn",
        usual_eps: "model.layers.0.input_layernorm",
        normalize_probabilities: "model.layers.0.mlp",
        destroy_an_expert_without_tokens: "model.layers.3.mlp",
        change_a_rare_token: "model.embed_tokens.weight",
    },
    # Without a norm of queries and keys.
    "dense": {
        swap_k_and_v: "model.layers.1.self_attn.k_proj",
        groups_in_another_order: "model.layers.0.self_attn.q_proj",
        change_a_down_projection: "model.layers.2.mlp",
        ascending_coefficients: "model.layers.0.mlp",
        change_a_matrix_a_little: "model.layers.1.self_attn.v_proj",
        swap_norms: "model.layers.1.input_layernorm",
        wrong_rope_theta: "model.layers.0.self_attn",
    },
    "per_expert": {
        swap_gate_and_up: "model.layers.0.mlp",
        coefficients_of_the_first_expert: "model.layers.2.mlp",
        drop_shared_expert: "model.layers.1.mlp",
        groups_in_another_order: "model.layers.0.self_attn.q_norm",
    },
    # Its architecture in transformers has scaled positions, which a short text does not show.
    "olmoe": {
        scale_positions_beyond_the_longest: "model.layers.0.self_attn",
        scale_positions_beyond_a_few: "model.layers.0.self_attn",
    },
}


@pytest.mark.parametrize("model", BREAKS)
def test_every_break_is_noticed_and_located(trained, exported, tmp_path, model):
    ((folder, *_),) = exported(model)
    breaks = {change.__name__: change for change in BREAKS[model]}
    (results,) = run_on_ranks(compare_broken, 1, trained(model), folder, breaks, tmp_path)
    expected = {change.__name__: module for change, module in BREAKS[model].items()}
    assert {name: found["first_difference"] for name, found in results.items()} == expected
    assert not any(found["passed"] for found in results.values())
    if model == "olmoe":
        for found in results.values():
            assert found["near_difference"] <= TOLERANCE < 0.1 < found["far_difference"]
            assert found["last_position"] == 127
    if model == "moe":
        loading = results["drop_an_expert"]["loading"]
        assert loading["missing_keys"] == ["model.layers.3.mlp.experts.7.down_proj.weight"]


def test_far_positions_reach_twice_the_longest_text():
    assert far_positions(4, 4).tolist() == [[0, 1, 6, 7]]
    assert far_positions(3, 100).tolist() == [[0, 198, 199]]


@pytest.mark.parametrize("activation", ["swiglu", "polynorm"])
@pytest.mark.parametrize("num_experts", [None, 4])
def test_an_error_does_not_reach_the_next_module(activation, num_experts):
    """With the outputs of the right model in place of its own, only the wrong module differs."""
    torch.manual_seed(0)
    config = ModelConfig(num_layers=2, hidden_size=48, num_query_groups=2, kv_channels=12)
    config.activation, config.vocab_size, config.ffn_hidden_size = activation, 99, 60
    if num_experts is not None:
        config.num_moe_experts, config.moe_ffn_hidden_size = num_experts, 60
        config.qk_norm = "full"
    fields = hf_config(config, seq_length=16, dtype="float32", bos=None, eos=0, pad=None)
    settings, model_class = config_and_model_class(fields)
    model = model_class(settings).eval()
    places = [f"model.layers.{i}.mlp" for i in range(2 if num_experts else 0)]
    rows = {
        place: expert_probe_rows(model.get_parameter(f"{place}.gate.weight")) for place in places
    }
    tokens = torch.arange(32).view(2, 16)
    expected = transformers_module_outputs(model, tokens, rows)
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight *= 1.01
    alone = transformers_module_outputs(model, tokens, rows, replacements=expected)
    free = transformers_module_outputs(model, tokens, rows)
    everywhere = torch.ones_like(tokens, dtype=torch.bool)
    wrong, reached = (
        {name for name, off in module_differences(expected, found, everywhere).items() if off > 0}
        for found in (alone, free)
    )
    assert wrong == {"model.layers.0.self_attn.v_proj"}
    assert {"model.layers.0.self_attn", "model.layers.1.mlp", "model.norm", "lm_head"} < reached


def recording(logits, probs=None):
    made = ModuleOutputs({"model.layers.0.mlp": torch.ones(1, 3, 2), "lm_head": logits})
    if probs is not None:
        made.probs["model.layers.0.mlp"] = probs
    return made


def test_experts_that_the_text_leaves_out_are_compared():
    probs = torch.tensor([[[0.4, 0.3, 0.0]] * 3])
    rows = torch.tensor([[[0.9, 0.1, 0.0], [0.1, 0.9, 0.0], [0.0, 0.2, 0.8]]])
    a, b = (recording(torch.zeros(1, 3, 2), probs) for _ in range(2))
    place = "model.layers.0.mlp"
    a.probe_outputs[place] = torch.ones(1, 3, 2), rows
    b.probe_outputs[place] = torch.ones(1, 3, 2), rows
    assert compared(a, b).passed
    assert experts_not_reached(a) == 0
    destroyed = torch.ones(1, 3, 2)
    destroyed[0, 2] = torch.nan
    b.probe_outputs[place] = destroyed, rows
    result = compared(a, b)
    assert not result.passed
    assert differing_module(a, b) == "model.layers.0.mlp.experts"
    assert result.to_dict()["module_differences"]["model.layers.0.mlp.experts"] is None
    a.probe_outputs[place] = torch.ones(1, 3, 2), rows[:, :1].expand(1, 3, 3)
    assert experts_not_reached(a) == 1


def test_rows_reach_every_expert():
    torch.manual_seed(0)
    weight = torch.randn(64, 48) * 0.02
    rows = expert_probe_rows(weight)
    chosen = (rows[0] @ weight.T).topk(2).indices
    assert set(chosen.flatten().tolist()) == set(range(64))


def test_a_large_logit_excuses_its_position_alone():
    a = torch.zeros(1, 3, 2)
    a[0, 0] = torch.tensor([1000.0, 0.0])
    b = a.clone()
    b[0, 0, 1] = 5e-3
    assert compared(recording(a), recording(b)).max_relative_difference == pytest.approx(5e-6)
    b[0, 1, 1] = 5e-3
    assert compared(recording(a), recording(b)).max_relative_difference == pytest.approx(5e-3)


def compared(expected, found):
    tokens = torch.tensor([[1, 0, 1]])
    return measure_parity(
        expected, found, tokens, {}, weights="float32", tolerance=1e-5, last_position=2
    )


def test_figures_by_hand():
    a = torch.tensor([[[0.0, 1.0], [0.0, 0.0], [3.0, 0.0]]])
    b = a.clone()
    b[0, 1, 0] = 0.5
    result = compared(recording(a), recording(b))
    assert not result.passed
    assert differing_module(recording(a), recording(b)) == "lm_head"
    assert result.max_difference == 0.5
    assert result.mean_difference == pytest.approx(0.5 / 6)
    p, q = torch.tensor([0.5, 0.5]), torch.tensor([0.5, 0.0]).double().softmax(0)
    assert result.kl == pytest.approx((p * (p / q).log()).sum().item() / 3)
    assert result.module_differences["lm_head"] == pytest.approx(0.5 / 10**0.5)
    # The loss of token 0 after the first place, and of token 1 after the second.
    by_hand = -torch.tensor([a[0, 0].log_softmax(0)[0], a[0, 1].log_softmax(0)[1]]).mean().item()
    assert result.checkpoint_loss == pytest.approx(by_hand)


def test_what_is_not_a_number_does_not_pass():
    a = torch.zeros(1, 3, 2)
    b = a.clone()
    b[0, 2, 1] = torch.nan
    assert not compared(recording(a), recording(b)).passed


def test_experts_that_are_tied_do_not_count_and_what_follows():
    probs = torch.tensor([[[0.4, 0.3, 0.0], [0.4, 0.3, 0.0], [0.4, 0.3, 0.0]]])
    tied = probs.clone()
    tied[0, 1] = torch.tensor([0.4, 0.0, 0.3 + 1e-7])
    a = torch.zeros(1, 3, 2)
    b = a.clone()
    b[0, 1:] = 1.0
    result = compared(recording(a, probs), recording(b, tied))
    assert result.passed
    assert (result.num_tokens, result.excluded_positions) == (1, 2)


def test_experts_of_other_probability_count():
    probs = torch.tensor([[[0.4, 0.3, 0.0]]])
    other = torch.tensor([[[0.4, 0.0, 0.2]]])
    a = recording(torch.zeros(1, 1, 2), probs)
    b = recording(torch.zeros(1, 1, 2), other)
    assert comparable_positions(a, b).all()
