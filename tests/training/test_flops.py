"""The FLOP formula against operations counted in a plain forward and backward pass."""

from __future__ import annotations

import pytest
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megapoly.config import Config, load_yaml, padded_vocab_size
from megapoly.config.resolve import resolve
from megapoly.config.schema import LoggingConfig, ModelConfig, ParallelConfig, TrainingConfig
from megapoly.platform.machine import CPU
from megapoly.testing import run_on_ranks
from megapoly.testing.jobs import RECIPES, shared_cache
from megapoly.training.flops import (
    device_peak,
    forward_flops_per_token,
    recomputed_flops_per_token,
    training_flops_per_token,
)

MODEL = {
    "num_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "ffn_hidden_size": 192,
    "make_vocab_size_divisible_by": 64,
    "activation_backend": "reference",
}
MOE = {
    "num_moe_experts": 4,
    "moe_ffn_hidden_size": 96,
    "moe_shared_expert_intermediate_size": 48,
    "ffn_hidden_size": 96,
}
FORMS = {
    "dense": {},
    "gated": {"activation": "swiglu"},
    "gqa, wide heads": {"num_query_groups": 2, "kv_channels": 24},
    "tied, padded": {
        "untie_embeddings_and_output_weights": False,
        "make_vocab_size_divisible_by": 3000,
    },
    "moe": MOE,
    "gated moe": MOE
    | {"activation": "gated_polynorm", "moe_router_topk": 3, "moe_grouped_gemm": False},
    "moe without shared expert": MOE | {"moe_shared_expert_intermediate_size": None},
}
RECOMPUTED = {
    "attention": ({}, {"recompute_granularity": "selective"}),
    "attention, ffn": (
        {},
        {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "mlp"]},
    ),
    "experts": (MOE, {"recompute_granularity": "selective", "recompute_modules": ["moe"]}),
    "one layer": (
        {},
        {
            "recompute_granularity": "full",
            "recompute_method": "block",
            "recompute_num_layers": 1,
        },
    ),
    "all layers": (
        MOE,
        {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 2,
        },
    ),
}


def configuration(model, parallel=None, **logging):
    config = Config(
        model=ModelConfig(**(MODEL | model)),
        parallel=ParallelConfig(**(parallel or {})),
        training=TrainingConfig(
            train_iters=1, seq_length=32, micro_batch_size=2, global_batch_size=2
        ),
        logging=LoggingConfig(**logging),
    )
    config.data.cache_dir = shared_cache().name
    return resolve(config, tokenizer_vocab_size=4096, machine=CPU)


def counted_flops_per_token(configs):
    """Count the matrix products of one micro-batch, separately those of attention, all [s, s]."""
    return [count(config) for config in configs]


def count(config):
    from megapoly.data.corpus import load_corpus
    from megapoly.data.tokenizer import load_tokenizer
    from megapoly.platform.device import select_platform
    from megapoly.training.distributed import process_groups
    from megapoly.training.state import build_state
    from megapoly.training.step import run_microbatches

    platform = select_platform("cpu")
    with process_groups(config, platform):
        corpus = load_corpus(config, tokenizer=load_tokenizer(None))
        state = build_state(config, platform, corpus)
        # Attention as two products, which are the only batched ones; its fused kernel on CPU is
        # none that torch counts.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            run_microbatches(state, state.training_batches(), 1, forward_only=False)
    counts = {str(name): count for name, count in counter.get_flop_counts()["Global"].items()}
    tokens = 2 * 32
    assert counts.keys() == {"aten.mm", "aten.bmm"}
    return counts["aten.mm"] / tokens, counts["aten.bmm"] / tokens


@pytest.fixture(scope="module")
def counted():
    configs = [configuration(model) for model in FORMS.values()]
    configs += [configuration(*options) for options in RECOMPUTED.values()]
    (results,) = run_on_ranks(counted_flops_per_token, 1, configs)
    return dict(zip([*FORMS, *RECOMPUTED], results, strict=True))


@pytest.mark.parametrize("form", FORMS)
def test_formula_is_what_is_computed(form, counted):
    config = configuration(FORMS[form])
    products, attention = counted[form]
    padding = 3 * 2 * 64 * (padded_vocab_size(config) - 4096)
    assert (padding > 0) == (form == "tied, padded")
    assert training_flops_per_token(config) == products - padding + attention / 2
    assert 3 * forward_flops_per_token(config).attention_scores == attention / 2


@pytest.mark.parametrize("form", RECOMPUTED)
def test_recomputation_is_what_is_computed_more(form, counted):
    model, parallel = RECOMPUTED[form]
    config = configuration(model, parallel)
    products, attention = counted[form]
    plain_products, plain_attention = counted["moe" if model else "dense"]
    more = products - plain_products + (attention - plain_attention) / 2
    assert recomputed_flops_per_token(config) == more > 0
    assert training_flops_per_token(config) == training_flops_per_token(configuration(model))


def test_blocks_of_layers_are_of_each_chunk_of_each_stage():
    block = {"recompute_granularity": "full", "recompute_method": "block"}
    stages = {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}
    config = configuration({"num_layers": 16}, block | stages | {"recompute_num_layers": 3})
    assert recomputed_flops_per_token(config) * 4 == forward_flops_per_token(config).layers * 3


def test_papers_models_by_hand():
    """2 operations for each active parameter of a matrix, and attention."""
    dense = resolve(
        load_yaml(RECIPES / "dense_1b_paper.yaml"), tokenizer_vocab_size=32000, machine=CPU
    )
    model = dense.model
    parameters = 24 * (4 * 2048**2 + 2 * 2048 * 8256) + 2048 * model.vocab_size
    attention = 24 * 2 * 2048 * dense.training.seq_length
    assert model.num_layers == 24 and model.ffn_hidden_size == 8256
    assert training_flops_per_token(dense) == 3 * (2 * parameters + attention)


@pytest.mark.parametrize(
    "device, options, flops",
    [
        ("NVIDIA A100-SXM4-80GB", {}, 312e12),
        ("NVIDIA A100-SXM4-80GB", {"peak_tflops": 250.0}, 250e12),
        ("NVIDIA H100 80GB HBM3", {}, 989.5e12),
        ("a device of tomorrow", {}, None),
        ("CPU, 2 threads", {"peak_tflops": 0.5}, 0.5e12),
    ],
)
def test_peak_and_its_source(device, options, flops):
    peak = device_peak(configuration({}, **options), device)
    if flops is None:
        assert peak is None
    else:
        assert peak.flops == flops
        assert peak.source == (
            "`logging.peak_tflops`" if options else f"bf16, data sheet of {device}"
        )


def test_an_a100_has_no_peak_in_fp8():
    config = configuration({})
    assert device_peak(config, "NVIDIA A100-SXM4-80GB", precision="fp8") is None
    assert device_peak(config, "NVIDIA H100 80GB HBM3", precision="fp8").flops == 1979e12
