"""Small models, trained for a few steps by the real job at several layouts, and their exports."""

from __future__ import annotations

import functools

import pytest
from conversions import export_and_compare

from megapoly.activations import registry
from megapoly.preflight.layouts import parse_layout
from megapoly.testing import run_job, run_on_ranks

# Weights, coefficients and norms are far from where they began, and from each other.
TINY = {
    "model.num_layers": 4,
    "model.hidden_size": 48,
    "model.init_method_std": 0.1,
    "training.train_iters": 3,
    "training.seq_length": 64,
    "training.micro_batch_size": 2,
    "training.global_batch_size": 4,
    "training.eval_interval": 0,
    "optimizer.lr": 0.03,
    "optimizer.lr_warmup_iters": 0,
    "logging.tensorboard": False,
}
DENSE = ("dense_tiny", {"model.ffn_hidden_size": 96})
MOE = ("moe_tiny", {"model.moe_ffn_hidden_size": 48})
# Recipe with options, layout, more options.
MODELS = {
    "dense": (
        DENSE,
        "tp2",
        {
            "model.activation": "polynorm",
            "model.num_query_groups": 2,
            "model.untie_embeddings_and_output_weights": False,
        },
    ),
    "polyrelu": (
        DENSE,
        "pp2",
        {"model.activation": "polyrelu", "model.activation_order": 4, "model.qk_norm": "head"},
    ),
    "moe": (MOE, "ep2", {"model.activation": "polynorm"}),
    "per_expert": (
        MOE,
        "tp2-ep2-etp1",
        {
            "model.activation": "gated_polynorm",
            "model.activation_coefficients": "per_expert",
            "model.moe_shared_expert_intermediate_size": 48,
            "model.num_query_groups": 2,
        },
    ),
    "olmoe": (MOE, "ep2", {"model.activation": "swiglu"}),
    # Of the parallel matrix.
    "polyrelunorm": (
        DENSE,
        "tp2-pp2",
        {
            "model.activation": "polyrelunorm",
            "model.activation_norm": "l2",
            "model.kv_channels": 24,
        },
    ),
    "polyprelu": (
        MOE,
        "pp2-ep2",
        {
            "model.activation": "polyprelu",
            "model.moe_router_pre_softmax": False,
            "model.untie_embeddings_and_output_weights": False,
        },
    ),
    "per_expert_polyprelu": (
        MOE,
        "ep2",
        {
            "model.activation": "polyprelu",
            "model.activation_coefficients": "per_expert",
            "model.qk_norm": "none",
        },
    ),
    "gated": (DENSE, "pp2", {"model.activation": "gated_polynorm", "model.num_query_groups": 1}),
    "geglu": (DENSE, "tp2", {"model.activation": "geglu"}),
    "bf16": (MOE, "ep2", {"training.bf16": True}),
    "sequential": (MOE, "tp2", {"model.moe_grouped_gemm": False}),
}


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """By the name of a model: its checkpoint."""

    @functools.cache
    def train(name):
        (recipe, widths), layout, options = MODELS[name]
        layout = parse_layout(layout)
        run_dir = tmp_path_factory.mktemp(name)
        if registry.get(options.get("model.activation", "polynorm")).has_coefficients:
            options = options | {"model.activation_backend": "reference"}  # nothing to compile
        run_job(
            recipe, run_dir, TINY | widths | options | layout.options, num_ranks=layout.world_size
        )
        return run_dir / "checkpoints" / "iter_0000003"

    return train


@pytest.fixture(scope="session")
def exported(trained, tmp_path_factory):
    """By the names of models: folder, parity, and the greedy continuations of both models."""
    done = {}

    def export(*names):
        missing = [name for name in names if name not in done]
        pairs = [(trained(name), tmp_path_factory.mktemp("export") / name) for name in missing]
        if pairs:
            (results,) = run_on_ranks(export_and_compare, 1, pairs)
            for name, (_, folder), result in zip(missing, pairs, results, strict=True):
                done[name] = (folder, *result)
        return [done[name] for name in names]

    return export
