"""What vLLM, continuous batching and compilers ask of the code in exports, as far as torch can."""

import copy

import pytest
import torch
from torch import nn
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from megapoly.conversion.remote_code.configuration_megapoly import MegapolyConfig
from megapoly.conversion.remote_code.ffn_megapoly import (
    NORMALIZED,
    MegapolyActivation,
    MegapolyRouter,
)
from megapoly.conversion.remote_code.modeling_megapoly import MegapolyForCausalLM

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
}
MIXTURE = {"num_experts": 5, "num_experts_per_tok": 2}
MODELS = {
    "dense": {"hidden_act": "gated_polynorm", "qk_norm": "head"},
    "moe": MIXTURE | {"hidden_act": "polynorm", "qk_norm": "full"},
    "per_expert": MIXTURE
    | {
        "hidden_act": "polyprelu",
        "activation_coefficients": "per_expert",
        "shared_expert_intermediate_size": 8,
        "norm_topk_prob": True,
    },
}
IDS = torch.arange(26).view(2, 13) * 37 % 97


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    torch.manual_seed(0)
    made = MegapolyForCausalLM(MegapolyConfig(**SIZES, **MODELS[request.param])).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return made


def logits(model, ids=IDS, **arguments):
    with torch.no_grad():
        return model(ids, **arguments).logits


@pytest.fixture
def attention(request):
    """Make an attention function known to transformers by this name."""

    def register(function):
        ALL_ATTENTION_FUNCTIONS.register("of_a_test", function)
        request.addfinalizer(lambda: ALL_ATTENTION_FUNCTIONS._global_mapping.pop("of_a_test"))

    return register


def rows(module, query, key, value, attention_mask, scaling, **_):
    """Causal attention whose result is [b s, heads d], as vLLM's; it makes its own mask."""
    assert attention_mask is None
    groups = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
    output = nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scaling
    )
    return output.transpose(1, 2).flatten(0, 1).flatten(1), None


def test_attention_functions_may_return_rows(model, attention):
    expected = logits(model)
    attention(rows)
    other = copy.deepcopy(model)
    other.config._attn_implementation = "of_a_test"
    # As vLLM calls the decoder: with positions, without cache and mask, for a tuple.
    with torch.no_grad():
        states = other.model(
            IDS, position_ids=torch.arange(13)[None], use_cache=False, return_dict=False
        )[0]
    assert (other.lm_head(states) - expected).abs().max() < 1e-5


def test_heads_of_another_rank_are_refused(model, attention):
    attention(lambda *args, **kwargs: (rows(*args, **kwargs)[0][:, :12], None))
    other = copy.deepcopy(model)
    other.config._attn_implementation = "of_a_test"
    with pytest.raises(ValueError, match=r"queries of 4 heads of 6 columns .* \(26, 12\)"):
        logits(other)


@pytest.mark.parametrize("name", NORMALIZED)
def test_part_of_a_row_is_refused(name):
    module = MegapolyActivation(MegapolyConfig(hidden_act=name), width=24)
    with pytest.raises(ValueError, match=f"{name} normalizes whole rows of 24 columns; it got 12"):
        module(torch.ones(3, 12))


def test_other_activations_take_part_of_a_row():
    module = MegapolyActivation(MegapolyConfig(hidden_act="polyrelu"), width=24)
    x = torch.randn(3, 24)
    assert torch.equal(module(x)[:, :12], module(x[:, :12]))


def test_vllm_leaves_experts_and_router_alone(model):
    """It takes over any list of modules called `experts`, and any linear layer."""
    for name, module in model.named_modules():
        if name.endswith(".experts"):
            assert not isinstance(module, nn.ModuleList)
            assert {p.ndim for p in module.parameters()} != {3}
        if name.endswith(".gate"):
            assert not isinstance(module, nn.Linear)


def test_router_computes_in_fp32():
    torch.manual_seed(0)
    router = MegapolyRouter(MegapolyConfig(hidden_size=64, num_experts=7)).bfloat16()
    nn.init.normal_(router.weight)
    x = torch.randn(9, 64).bfloat16()
    exact = x.double() @ router.weight.double().T
    assert (router(x) - exact).abs().max() < 1e-5


class PagedCache:
    """Keys and values by layer, without a length, as of continuous batching."""

    def __init__(self):
        self.layers, self.seen = {}, []

    def update(self, key, value, layer_idx, kwargs):
        self.seen.append(kwargs["read_index"])
        before = self.layers.get(layer_idx, (key[:, :, :0], value[:, :, :0]))
        after = tuple(torch.cat(pair, 2) for pair in zip(before, (key, value), strict=True))
        self.layers[layer_idx] = after
        return after


def test_a_cache_without_length(model):
    cache, parts = PagedCache(), []
    for start, stop in ((0, 8), (8, 9), (9, 13)):
        mask = torch.arange(stop) <= torch.arange(start, stop)[:, None]
        parts.append(
            logits(
                model,
                IDS[:, start:stop],
                attention_mask=mask[None, None].expand(2, 1, -1, -1),
                position_ids=torch.arange(start, stop)[None],
                cache=cache,
                use_cache=False,
                read_index=start,
            )
        )
    assert (torch.cat(parts, 1) - logits(model)).abs().max() < 1e-5
    assert cache.seen == [0, 0, 8, 8, 9, 9]


def test_continuous_batching(model):
    prompts = [IDS[0].tolist(), IDS[1, :4].tolist(), IDS[1, 2:9].tolist()]
    greedy = GenerationConfig(max_new_tokens=5, do_sample=False, pad_token_id=0)
    alone = [
        model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            generation_config=greedy,
        )[0, len(prompt) :].tolist()
        for prompt in prompts
    ]
    together = model.generate_batch(
        prompts,
        greedy,
        # Sizes that are not given are made of all free memory.
        ContinuousBatchingConfig(page_size=16, num_blocks=8, max_batch_tokens=64),
        warmup=False,
    )
    assert sorted(each.generated_tokens for each in together.values()) == sorted(alone)


def test_a_graph_without_breaks(model):
    """The same graph is right whatever the router chooses."""
    compiled = torch.compile(copy.deepcopy(model), backend="eager", fullgraph=True)
    for ids in (IDS, IDS.flip(1)):
        assert (logits(compiled, ids, use_cache=False) - logits(model, ids)).abs().max() < 1e-5


def test_traced_experts_are_those_of_each_input(model):
    class Logits(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, ids):
            return self.model(ids, use_cache=False).logits

    with torch.no_grad():
        program = torch.export.export(Logits(), (IDS,), strict=False).module()
        for ids in (IDS, IDS.flip(1)):
            assert (program(ids) - logits(model, ids)).abs().max() < 1e-5


def test_experts_that_overflow_count_only_where_chosen():
    """fp16 ends at 65504, which the cube of an activation passes."""
    torch.manual_seed(0)
    config = MegapolyConfig(**SIZES, **MIXTURE, hidden_act="polyrelu")
    mlp = MegapolyForCausalLM(config).half().model.layers[0].mlp.eval()
    with torch.no_grad():
        mlp.experts.get_submodule("0").up_proj.weight.mul_(1e3)
        mlp.gate.weight[0] = -100.0
        x = torch.rand(1, 6, 32).half() + 1.0
        expected, _ = mlp(x)
        compiled, _ = torch.compile(mlp, backend="eager", fullgraph=True)(x)
    assert compiled.isfinite().all()
    assert (compiled - expected).abs().max() < 1e-3


def test_only_a_mixture_has_a_router_loss(model):
    """TRL's SFTTrainer asks for it where the configuration has these."""
    names = {"output_router_logits", "router_aux_loss_coef"}
    is_mixture = model.config.num_experts is not None
    assert names & set(vars(model.config)) == (names if is_mixture else set())
    loss = model(IDS, labels=IDS, output_router_logits=True)
    assert (loss.aux_loss is not None) == is_mixture
