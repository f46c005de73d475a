"""Small copies keep the kind of the model and what its sizes divide by."""

import dataclasses
from math import gcd

import pytest

from megapoly.activations import ACTIVATIONS
from megapoly.config import Config, load_yaml
from megapoly.config.rules import find_problems
from megapoly.errors import ConfigError
from megapoly.platform.machine import CPU
from megapoly.preflight.layouts import parse_layout
from megapoly.preflight.parallel_check.scaled import left_out, scaled_down
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


# What the copy sets; every other option is the configuration's.
REPLACED = {
    "model": {
        *("num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "kv_channels"),
        *("ffn_hidden_size", "moe_ffn_hidden_size", "moe_shared_expert_intermediate_size"),
        *("vocab_size", "num_moe_experts", "moe_router_topk", "init_method_std"),
        *("hidden_dropout", "attention_dropout", "activation_backend"),
        *("transformer_engine", "apply_rope_fusion", "moe_permute_fusion"),
    },
    "parallel": {
        *("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"),
        *("virtual_pipeline_model_parallel_size", "cp_comm_type", "expert_model_parallel_size"),
        *("expert_tensor_parallel_size", "sequence_parallel", "use_distributed_optimizer"),
        *("overlap_grad_reduce", "overlap_param_gather", "recompute_num_layers"),
    },
    "data": {"blend", "validation", "tokenizer", "cache_dir", "num_workers"},
    "optimizer": {name for name in vars(Config().optimizer) if "lr" in name.split("_")},
    "training": {
        *("train_iters", "train_tokens", "seq_length", "micro_batch_size", "global_batch_size"),
        *("bf16", "fp8", "fp8_recipe", "fp8_amax_history_len", "fp8_amax_compute_algo", "device"),
        *("first_last_layers_bf16", "gradient_accumulation_fusion"),
        *(name for name in vars(Config().training) if name.startswith("eval")),
    },
}


@pytest.mark.parametrize("section", REPLACED)
def test_every_other_option_is_the_configurations(section):
    """Also one that is added later: each gets a value here that no default has."""
    config = load_yaml(RECIPES / "moe_tiny.yaml")
    kept = vars(getattr(config, section)).keys() - REPLACED[section]
    markers = {}
    for name in kept:
        value = getattr(getattr(config, section), name)
        if isinstance(value, bool):
            markers[name] = not value
        elif isinstance(value, int | float):
            markers[name] = value + 1
        else:
            continue  # a word: `test_recipes_scale_down`
        setattr(getattr(config, section), name, markers[name])
    small = scaled_down(config, steps=3, bf16=False)
    assert {name: getattr(getattr(small, section), name) for name in markers} == markers
    assert section == "parallel" or markers


def layouts_of(*names):
    return [parse_layout(name) for name in names]


def problems_of(config, *names):
    layouts = layouts_of(*names)
    small = scaled_down(config, steps=1, bf16=False, layouts=layouts)
    return small, [
        problem
        for layout in layouts
        for problem in find_problems(
            layout.applied_to(small), world_size=layout.world_size, machine=CPU
        )
    ]


@pytest.mark.parametrize("recipe", ["dense_tiny", "moe_tiny"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_can_be_checked(activation, recipe):
    config = load_yaml(RECIPES / f"{recipe}.yaml")
    config.model.activation = activation
    if not ACTIVATIONS[activation].has_coefficients:
        config.model.activation_backend = "auto"
    config.model.activation_coefficients = "shared"
    small, problems = problems_of(config, "1", "tp2", "cp2-dp2")
    assert problems == [] and small.model.activation == activation


@pytest.mark.parametrize(
    ("heads", "groups", "layout"),
    [(40, 8, "tp2"), (40, 8, "tp8"), (28, 4, "tp4"), (28, 4, "tp2-cp2-a2a"), (71, 1, "dp2")]
    + [(24, 6, "tp3"), (24, 24, "tp3-dp2"), (32, 8, "tp4")],
)
def test_query_heads_keep_their_ratio_to_key_value_heads(heads, groups, layout):
    config = load_yaml(RECIPES / "dense_tiny.yaml")
    config.model.num_attention_heads, config.model.num_query_groups = heads, groups
    small, problems = problems_of(config, layout)
    assert problems == []
    assert small.model.num_attention_heads * groups == small.model.num_query_groups * heads
    assert small.model.num_attention_heads <= heads


@pytest.mark.parametrize(
    ("layout", "sizes"),
    [
        ("dp3", {"global_batch_size": 9, "seq_length": 64}),
        ("cp3", {"global_batch_size": 8, "seq_length": 66}),
        ("tp3-cp2", {"global_batch_size": 8, "seq_length": 72}),
        ("pp3-vpp2-dp2", {"global_batch_size": 12, "seq_length": 64}),
        ("dp7", {"global_batch_size": 14, "seq_length": 64}),
    ],
)
def test_batch_and_length_fit_the_layouts(layout, sizes):
    config = load_yaml(RECIPES / "dense_tiny.yaml")
    model = config.model
    model.num_layers, model.num_attention_heads, model.ffn_hidden_size = 12, 12, 1152
    model.num_query_groups = None
    small, problems = problems_of(config, layout)
    assert problems == []
    assert {name: getattr(small.training, name) for name in sizes} == sizes


def test_a_size_that_a_layout_does_not_divide_stays_one():
    config = load_yaml(RECIPES / "moe_tiny.yaml")
    config.model.num_moe_experts, config.model.num_layers = 16, 8
    for layout, what in (("ep3-dp3", "num_moe_experts"), ("pp3", "num_layers")):
        _, problems = problems_of(config, layout)
        assert len(problems) == 1 and what in problems[0]


@pytest.mark.parametrize(
    ("experts", "topk", "expected"),
    [(64, 8, (8, 2)), (8, 2, (8, 2)), (4, 4, (4, 4)), (128, 1, (8, 1)), (60, 30, (8, 4))],
)
def test_experts_of_a_token(experts, topk, expected):
    config = load_yaml(RECIPES / "moe_tiny.yaml")
    config.model.num_moe_experts, config.model.moe_router_topk = experts, topk
    model = scaled_down(config, steps=1, bf16=False).model
    assert (model.num_moe_experts, model.moe_router_topk) == expected


def test_a_vocabulary_smaller_than_the_built_in_one():
    config = load_yaml(RECIPES / "dense_tiny.yaml")
    config.model.vocab_size = 1009
    assert scaled_down(config, steps=1, bf16=False).model.vocab_size == 4097  # 8 k + 1, as 1009


@pytest.mark.parametrize("style", ["linear", "cosine", "exponential", "minus_sqrt"])
def test_every_schedule_becomes_a_constant_rate(style):
    config = load_yaml(RECIPES / "dense_tiny.yaml")
    config.optimizer.lr_decay_style, config.optimizer.lr_wsd_decay_iters = "WSD", 20
    config.optimizer.lr_wsd_decay_style = style
    small, problems = problems_of(config, "dp2")
    assert problems == [] and small.optimizer.lr == small.optimizer.min_lr == 1e-4


def test_fp8_is_refused():
    config = load_yaml(RECIPES / "dense_tiny.yaml")
    config.training.fp8 = "hybrid"
    with pytest.raises(ConfigError, match=r"`training.fp8` \(hybrid\) cannot be checked here"):
        scaled_down(config, steps=1, bf16=False)


def test_dropout_is_left_out_and_said():
    config = load_yaml(RECIPES / "dense_tiny.yaml")
    assert left_out(config) == []
    config.model.hidden_dropout = 0.1
    assert scaled_down(config, steps=1, bf16=False).model.hidden_dropout == 0.0
    (sentence,) = left_out(config)
    assert sentence.startswith("`model.hidden_dropout` (0.1) is not checked")
