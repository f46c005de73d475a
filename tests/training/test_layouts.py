"""The same losses at every layout, from the same seed."""

import pytest

from megapoly.testing import run_job

# The recipe's own width. Gradient accumulation: at least 2 micro-batches a step.
SMALL = {
    "model.num_layers": 2,
    "training.train_iters": 10,
    "training.seq_length": 64,
    "training.micro_batch_size": 1,
    "training.global_batch_size": 4,
    "training.eval_interval": 10,
    "training.eval_iters": 1,
    "optimizer.lr": 1e-3,  # gentle steps: rounding differences between layouts stay small
    "optimizer.min_lr": 1e-4,
    "optimizer.lr_warmup_iters": 2,
    "checkpoint.save": False,
    "logging.tensorboard": False,
    "model.activation_backend": "reference",
}


def train(tmp_path_factory, recipe, overrides, num_ranks):
    run_dir = tmp_path_factory.mktemp("run")
    return run_job(recipe, run_dir, SMALL | overrides, num_ranks=num_ranks)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    cache = {}

    def metrics(recipe, **overrides):
        key = (recipe, *sorted(overrides.items()))
        if key not in cache:
            cache[key] = train(tmp_path_factory, recipe, overrides, 1)
        return cache[key]

    return metrics


T, E, ET = (
    "parallel.tensor_model_parallel_size",
    "parallel.expert_model_parallel_size",
    "parallel.expert_tensor_parallel_size",
)
P = "parallel.pipeline_model_parallel_size"
SHARDED_OPTIMIZER = {
    "parallel.use_distributed_optimizer": True,
    "parallel.overlap_grad_reduce": True,
    "parallel.overlap_param_gather": True,
}
ALL_GATHER = {"model.moe_token_dispatcher_type": "allgather"}
RECOMPUTE = {"parallel.recompute_granularity": "selective"}
LAYOUTS = {
    "moe-ep2": ("moe_tiny", 2, {E: 2}),
    "moe-tp2": ("moe_tiny", 2, {T: 2}),
    "moe-tp2-ep2-etp1": ("moe_tiny", 2, {T: 2, E: 2, ET: 1}),
    "moe-tp2-ep2": ("moe_tiny", 4, {T: 2, E: 2}),
    "moe-ep2-sharded-optimizer": ("moe_tiny", 2, {E: 2} | SHARDED_OPTIMIZER | ALL_GATHER),
    "dense-tp2": ("dense_tiny", 2, {T: 2} | RECOMPUTE),
    "dense-pp2": ("dense_tiny", 2, {P: 2}),
}


@pytest.mark.parametrize(("recipe", "num_ranks", "layout"), LAYOUTS.values(), ids=LAYOUTS)
def test_losses_are_those_of_one_process(tmp_path_factory, one_process, recipe, num_ranks, layout):
    expected = one_process(recipe)
    actual = train(tmp_path_factory, recipe, layout, num_ranks)
    for a, b in zip(actual, expected, strict=True):
        assert a.keys() == b.keys()
        assert a["lm_loss"] == pytest.approx(b["lm_loss"], abs=2e-5)
        for name in a.keys() & {"val/books/loss", "load_balancing_loss", "z_loss"}:
            assert a[name] == pytest.approx(b[name], abs=1e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
