"""Two tiny mixtures of experts, the same at two layouts, and the analysis of each."""

from __future__ import annotations

import functools

import pytest
from analysis_jobs import NUM_TOKENS, analysed

from megapoly.data.builtin import builtin_documents
from megapoly.data.token_files import write_token_file
from megapoly.data.tokenizer import load_tokenizer
from megapoly.preflight.layouts import parse_layout
from megapoly.testing import run_job, run_on_ranks

TINY = {
    "model.num_layers": 2,
    "model.hidden_size": 32,
    "model.num_attention_heads": 4,
    "model.moe_ffn_hidden_size": 48,
    "model.num_moe_experts": 4,
    "model.moe_shared_expert_intermediate_size": 48,
    "model.init_method_std": 0.1,
    "model.activation": "gated_polynorm",
    "model.activation_coefficients": "per_expert",
    "model.activation_backend": "reference",
    "training.train_iters": 2,
    "training.seq_length": 32,
    "training.micro_batch_size": 1,
    "training.global_batch_size": 4,
    "training.eval_interval": 0,
    "optimizer.lr": 0.01,
    "optimizer.lr_warmup_iters": 0,
    "logging.detail_interval": 1,
}


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """A token file of more than two samples."""
    prefix = tmp_path_factory.mktemp("text") / "a"
    write_token_file(prefix, [next(iter(builtin_documents())).text[:600]], load_tokenizer(None))
    return prefix


@pytest.fixture(scope="session")
def trained(tmp_path_factory, text):
    """By a layout: the run."""

    @functools.cache
    def train(name):
        layout, run_dir = parse_layout(name), tmp_path_factory.mktemp("run")
        options = TINY | {"data.blend": f"[{text}]", "data.validation": f"{{a: {text}}}"}
        options |= layout.options
        run_job("moe_tiny", run_dir, options, num_ranks=layout.world_size)
        return run_dir

    return train


@pytest.fixture(scope="session")
def analysis(trained, tmp_path_factory):
    """By a layout: analysis.json of its run."""

    @functools.cache
    def analyse(name):
        output = tmp_path_factory.mktemp("analysis")
        arguments = trained(name), output, "--tokens", NUM_TOKENS
        (found,) = run_on_ranks(analysed, 1, *arguments)
        return found

    return analyse
