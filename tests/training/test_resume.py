"""Checkpoints: stopping and resuming changes nothing."""

import re
import shutil

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader

from megapoly.testing import run_job

# Dropout: the random state must also be right.
TINY = {
    "model.num_layers": 2,
    "model.hidden_size": 64,
    "model.hidden_dropout": 0.1,
    "model.attention_dropout": 0.1,
    "model.activation_backend": "reference",
    "training.train_iters": 8,
    "training.seq_length": 32,
    "training.micro_batch_size": 1,
    "training.global_batch_size": 4,
    "training.eval_interval": 4,
    "training.eval_iters": 1,
    "optimizer.lr_warmup_iters": 2,
    "logging.tensorboard": False,
}
MOE = TINY | {"model.moe_ffn_hidden_size": 96}
DENSE = TINY | {"model.ffn_hidden_size": 192}
TIMES = {"step_time_s", "tokens_per_second", "tflops_per_device", "time"}


def results(metrics):
    return [{name: value for name, value in line.items() if name not in TIMES} for line in metrics]


TENSOR = {"parallel.tensor_model_parallel_size": 2}
EXPERT = {"parallel.expert_model_parallel_size": 2}
SHARDED_OPTIMIZER = {"parallel.use_distributed_optimizer": True}
PER_EXPERT = {"model.activation_coefficients": "per_expert"}


@pytest.mark.parametrize(
    ("recipe", "overrides", "num_ranks"),
    [
        ("dense_tiny", DENSE, 1),
        ("dense_tiny", DENSE | {"training.bf16": True}, 1),
        ("moe_tiny", MOE | PER_EXPERT, 1),
        ("moe_tiny", MOE | TENSOR | EXPERT | {"parallel.expert_tensor_parallel_size": 1}, 2),
        ("moe_tiny", MOE | EXPERT | SHARDED_OPTIMIZER | PER_EXPERT, 2),
    ],
    ids=["dense", "dense-bf16", "moe", "moe-tp2-ep2", "moe-ep2-distributed-optimizer"],
)
def test_resumed_losses_are_the_same_bits(tmp_path, recipe, overrides, num_ranks):
    whole = run_job(recipe, tmp_path / "whole", overrides, num_ranks=num_ranks)
    saving = overrides | {"checkpoint.save_interval": 3, "checkpoint.keep": 0}
    run_job(recipe, tmp_path / "halves", saving, num_ranks=num_ranks)
    # As if it had been killed after step 8: metrics of step 8, newest checkpoint of step 6.
    shutil.rmtree(tmp_path / "halves" / "checkpoints" / "iter_0000008")
    resumed = run_job(recipe, tmp_path / "halves", saving, num_ranks=num_ranks)
    assert [line["iteration"] for line in resumed] == list(range(1, 9))
    assert results(resumed) == results(whole)


NO_DROPOUT = {"model.hidden_dropout": 0.0, "model.attention_dropout": 0.0}
PRIME = {"model.vocab_size": 4099, "model.make_vocab_size_divisible_by": 1}
TIED = {"model.untie_embeddings_and_output_weights": False}


@pytest.mark.parametrize(
    "options",
    [SHARDED_OPTIMIZER, pytest.param(TIED, marks=pytest.mark.parallel)],
    ids=["distributed-optimizer", "tied"],
)
def test_another_padding_resumes_with_the_same_losses(tmp_path, options):
    """4099 rows on one process, 4100 on two, 4224 on one again."""
    overrides = DENSE | NO_DROPOUT | PRIME | options | {"training.train_iters": 9}
    overrides |= {"checkpoint.save_interval": 3, "checkpoint.keep": 0}
    whole = run_job("dense_tiny", tmp_path, overrides)
    checkpoints = tmp_path / "checkpoints"
    shutil.rmtree(checkpoints / "iter_0000006")
    for num_ranks, layout in ((2, TENSOR), (1, {"model.make_vocab_size_divisible_by": 128})):
        shutil.rmtree(checkpoints / "iter_0000009")
        resumed = run_job("dense_tiny", tmp_path, overrides | layout, num_ranks=num_ranks)
        assert [line["iteration"] for line in resumed] == list(range(1, 10))
        for line, expected in zip(resumed, whole, strict=True):
            assert line["lm_loss"] == pytest.approx(expected["lm_loss"], abs=2e-6)
    saved = vocabulary_tensors(checkpoints / "iter_0000009")
    weights = {name for name in saved if not name.startswith("optimizer.")}
    assert len(weights) == (1 if options == TIED else 2)
    for moment in ("exp_avg", "exp_avg_sq"):
        assert {f"optimizer.state.{moment}.{name}" for name in weights} < saved.keys()
    for name, tensor in saved.items():
        assert tensor[:4099].any(), name
        assert len(tensor) == 4224 and not tensor[4099:].any(), name


def vocabulary_tensors(checkpoint):
    """Return the tensors of embedding and output layer: weights and optimizer state."""
    reader = FileSystemReader(checkpoint)
    entries = reader.read_metadata().state_dict_metadata
    names = [name for name in entries if "word_embeddings" in name or "output_layer" in name]
    tensors = {name: torch.empty(entries[name].size) for name in names}
    dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors


def test_checkpoints_that_do_not_fit_are_refused(tmp_path):
    unfinished = tmp_path / "checkpoints" / ".iter_0000002.partial"
    unfinished.mkdir(parents=True)
    overrides = DENSE | {"training.train_iters": 3, "checkpoint.save_interval": 1}
    run_job("dense_tiny", tmp_path, overrides)
    # The newest two (`checkpoint.keep`), and nothing unfinished.
    assert sorted(path.name for path in unfinished.parent.iterdir()) == [
        "iter_0000002",
        "iter_0000003",
    ]
    wrong = {
        "model.num_layers=3": "`model.num_layers` is 3 here and 2 in the checkpoint",
        "data.seed=7": "was trained on other data",
        "training.global_batch_size=8": "another `training.global_batch_size` (4, here 8)",
        "checkpoint.resume=false": "`checkpoint.resume` is false",
    }
    for option, message in wrong.items():
        name, value = option.split("=")
        with pytest.raises(RuntimeError, match=re.escape(message)):
            run_job("dense_tiny", tmp_path, overrides | {name: value})

    newest = unfinished.parent / "iter_0000003"
    written = newest.stat().st_ino, (newest / "run.json").stat().st_mtime_ns
    metrics = (tmp_path / "metrics.jsonl").read_text()
    run_job("dense_tiny", tmp_path, overrides)  # a finished run: nothing to do, nothing rewritten
    assert (newest.stat().st_ino, (newest / "run.json").stat().st_mtime_ns) == written
    assert (tmp_path / "metrics.jsonl").read_text() == metrics


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path):
    overrides = DENSE | {"optimizer.lr": 1e30, "optimizer.clip_grad": 0.0}
    with pytest.raises(RuntimeError, match="both must be finite"):
        run_job("dense_tiny", tmp_path, overrides)
    assert not list((tmp_path / "checkpoints").iterdir())


def test_weights_start_another_run_on_other_data(tmp_path):
    first = DENSE | NO_DROPOUT | {"training.train_iters": 20}
    run_job("dense_tiny", tmp_path / "first", first)
    checkpoint = tmp_path / "first" / "checkpoints" / "iter_0000020"
    start = {"checkpoint.load": checkpoint, "checkpoint.load_weights_only": True}
    overrides = (
        first | start | {"data.seed": 7, "training.train_iters": 1, "checkpoint.save": False}
    )
    (metrics,) = run_job("dense_tiny", tmp_path / "second", overrides)
    assert metrics["iteration"] == 1 and metrics["learning_rate"] == 0.0
    assert metrics["lm_loss"] < 7.9  # untrained: ln 4096 = 8.3
