"""Every activation trains in both tiny recipes."""

import json
import os
from pathlib import Path

import pytest

from megapoly import activations
from megapoly.pretrain import main
from megapoly.testing import run_on_ranks
from megapoly.testing.jobs import RECIPES, shared_cache

SMALL = {
    "model.num_layers": 2,
    "model.hidden_size": 64,
    "training.train_iters": 12,
    "training.seq_length": 32,
    "training.micro_batch_size": 8,
    "training.global_batch_size": 8,
    "training.eval_interval": 0,
    "optimizer.lr": 1e-2,
    "optimizer.lr_warmup_iters": 2,
    "checkpoint.save": False,
    "logging.tensorboard": False,
    "logging.log_interval": 12,
}
# Compiling takes four times as long as the training; tests/ops compiles the operators, too.
COMPILED = ("dense_tiny-polyrelu", "moe_tiny-polyprelu-per-expert")
REFERENCE = {"model.activation_backend": "reference"}
VARIANTS = {
    "polynorm-order-2": {"model.activation": "polynorm", "model.activation_order": 2},
    "polyrelu-order-4": {"model.activation": "polyrelu", "model.activation_order": 4},
    "polynorm-l2": {"model.activation": "polynorm", "model.activation_norm": "l2"},
    "polyprelu-per-expert": {
        "model.activation": "polyprelu",
        "model.activation_coefficients": "per_expert",
    },
    "gated-polynorm-per-expert": {
        "model.activation": "gated_polynorm",
        "model.activation_coefficients": "per_expert",
    },
}


def jobs():
    """Yield (name, recipe, overrides) of every job."""
    cases = [
        (f"{recipe}-{name}", recipe, {"model.activation": name})
        for name in activations.ACTIVATIONS
        for recipe in ("dense_tiny", "moe_tiny")
    ]
    cases += [(f"moe_tiny-{name}", "moe_tiny", options) for name, options in VARIANTS.items()]
    for name, recipe, overrides in cases:
        has_backend = activations.ACTIVATIONS[overrides["model.activation"]].has_coefficients
        reference = has_backend and name not in COMPILED
        yield name, recipe, overrides | (REFERENCE if reference else {})


def train_each(folder, cache_dir):
    """Train every second job alone, from this rank's number on."""
    rank = int(os.environ["RANK"])
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):  # without them a process is a job by itself
        del os.environ[name]
    for name, recipe, overrides in list(jobs())[rank::2]:
        settings = SMALL | overrides | {"run_dir": f"{folder}/{name}", "data.cache_dir": cache_dir}
        argv = [f"--{key}={value}" for key, value in settings.items()]
        assert main(argv, default_recipe=RECIPES / f"{recipe}.yaml", program="test") == 0


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    run_on_ranks(train_each, 2, str(folder), shared_cache().name, timeout_s=500)
    return folder


@pytest.mark.parametrize("name", [name for name, _, _ in jobs()])
def test_loss_falls(runs, name):
    lines = (Path(runs) / name / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["lm_loss"] for line in lines]
    assert len(losses) == 12
    assert losses[0] == pytest.approx(8.34, abs=0.05)  # ln 4096 = 8.32: nothing is known yet
    assert sum(losses[-4:]) / 4 < losses[0] - 0.8
