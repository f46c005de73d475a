"""The FLOP formula against operations counted in a plain forward and backward pass."""

import pytest
from torch.utils.flop_counter import FlopCounterMode

from megapoly.config import Config
from megapoly.config.machine import CPU
from megapoly.config.resolve import resolve
from megapoly.config.schema import ModelConfig, TrainingConfig
from megapoly.testing import run_on_ranks
from megapoly.testing.jobs import shared_cache
from megapoly.training.flops import peak_tflops, training_flops_per_token

MODEL = {
    "num_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_query_groups": 2,
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


def configuration(**model):
    config = Config(
        model=ModelConfig(**(MODEL | model)),
        training=TrainingConfig(
            train_iters=1, seq_length=32, micro_batch_size=2, global_batch_size=2
        ),
    )
    return resolve(config, tokenizer_vocab_size=4096, machine=CPU)


def counted_flops_per_token(config, cache_dir):
    """Matrix products of one micro-batch; attention's, which torch counts in full, not causal."""
    from megapoly.data.corpus import load_corpus
    from megapoly.data.tokenizer import load_tokenizer
    from megapoly.platform import select_platform
    from megapoly.training.distributed import process_groups
    from megapoly.training.state import build_state
    from megapoly.training.step import run_microbatches

    config.data.cache_dir = cache_dir
    platform = select_platform("cpu")
    with process_groups(config, platform):
        corpus = load_corpus(config, tokenizer=load_tokenizer(None))
        state = build_state(config, platform, corpus)
        with FlopCounterMode(display=False) as counter:
            run_microbatches(state, state.training_batches(), 1, forward_only=False)
    counts = {str(name): count for name, count in counter.get_flop_counts()["Global"].items()}
    attention = sum(count for name, count in counts.items() if "attention" in name)
    tokens = 2 * 32
    return (sum(counts.values()) - attention) / tokens


@pytest.mark.parametrize(
    "model", [{}, {"activation": "swiglu"}, MOE], ids=["dense", "gated", "moe"]
)
def test_formula_is_what_is_computed(model):
    config = configuration(**model)
    (counted,) = run_on_ranks(counted_flops_per_token, 1, config, shared_cache().name)
    attention = 3 * 2 * config.model.num_layers * 64 * 32  # causal half of QK^T and PV
    assert training_flops_per_token(config) - attention == counted


def test_peaks():
    assert peak_tflops("NVIDIA A100-SXM4-80GB") == 312.0
    assert peak_tflops("a device of tomorrow") is None
