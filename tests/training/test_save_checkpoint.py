"""Saving in the background: the same bits, and nothing half written under a checkpoint's name."""

import json
from pathlib import Path

import pytest
import saving_jobs
import torch
import torch.distributed.checkpoint as dcp
from processes import names, wait_until
from torch.distributed.checkpoint import FileSystemReader

from megapoly.checkpoints.verify import verify
from megapoly.testing import run_on_ranks
from megapoly.testing.jobs import shared_cache

TINY = {
    "model.num_layers": 2,
    "model.hidden_size": 64,
    "model.ffn_hidden_size": 96,
    "model.hidden_dropout": 0.1,  # the random state must also be that of the step
    "model.activation_backend": "reference",
    "training.train_iters": 8,
    "training.seq_length": 16,
    "training.micro_batch_size": 1,
    "training.global_batch_size": 4,
    "training.eval_interval": 0,
    "training.device": "cpu",
    "optimizer.lr_warmup_iters": 2,
    "checkpoint.save_interval": 3,
    "checkpoint.keep": 0,
    "logging.tensorboard": False,
}
SHARDED_BF16 = {"parallel.use_distributed_optimizer": True, "training.bf16": True}
TIMES = {"step_time_s", "tokens_per_second", "tflops_per_device", "time"}


def arguments(run_dir, options):
    fixed = {"run_dir": run_dir, "data.cache_dir": shared_cache().name}
    return [f"--{name}={value}" for name, value in (TINY | fixed | options).items()]


def metrics(run_dir):
    lines = (json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines())
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


def checkpoint(run_dir, iteration):
    return run_dir / "checkpoints" / f"iter_{iteration:07d}"


def content(folder):
    """Return the tensors and other entries of a checkpoint, after verifying it."""
    verdict = verify(folder)
    assert verdict.is_sealed and not verdict.damages
    reader = FileSystemReader(folder)
    entries = reader.read_metadata().state_dict_metadata
    result = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        if hasattr(entry, "size")
        else None
        for name, entry in entries.items()
    }
    dcp.load(result, storage_reader=reader, no_dist=True)
    return result


def same_bits(first, second):
    assert first.keys() == second.keys() and first
    for name, value in first.items():
        if isinstance(value, torch.Tensor):
            assert value.dtype == second[name].dtype and torch.equal(value, second[name]), name


@pytest.fixture(scope="module")
def waited_for(tmp_path_factory):
    """Return a run on two ranks that waits for each of its checkpoints."""
    run_dir = tmp_path_factory.mktemp("waited")
    options = SHARDED_BF16 | {"checkpoint.async_save": False}
    run_on_ranks(saving_jobs.run, 2, arguments(run_dir, options))
    return run_dir


def test_what_is_saved_is_the_state_of_its_step_however_late_it_is_written(waited_for, tmp_path):
    """Step 3 is written after step 5, and its memory is still that of step 3."""
    printed, _ = run_on_ranks(
        saving_jobs.run_past_writers, 2, arguments(tmp_path, SHARDED_BF16), tmp_path, 5
    )
    lines = printed.splitlines()
    assert f"saved {checkpoint(tmp_path, 3)}" in lines
    assert metrics(tmp_path) == metrics(waited_for)
    for iteration in (3, 6, 8):
        same_bits(
            content(checkpoint(tmp_path, iteration)), content(checkpoint(waited_for, iteration))
        )
    assert sorted(names(tmp_path / "checkpoints", "*")) == [f"iter_{i:07d}" for i in (3, 6, 8)]


def test_a_run_killed_while_saving_loses_nothing_and_leaves_no_writer(waited_for, tmp_path):
    argv = arguments(tmp_path, SHARDED_BF16)
    with pytest.raises(RuntimeError, match="ended without a result"):
        run_on_ranks(saving_jobs.run_and_die, 2, argv, tmp_path, 4)
    assert names(tmp_path / "checkpoints", "*") == [".iter_0000003.partial"]
    for rank in range(2):
        pid = (tmp_path / saving_jobs.WRITER.format(rank)).read_text()
        wait_until(lambda pid=pid: has_ended(pid))
    run_on_ranks(saving_jobs.run, 2, argv)
    assert metrics(tmp_path) == metrics(waited_for)
    same_bits(content(checkpoint(tmp_path, 8)), content(checkpoint(waited_for, 8)))


def has_ended(pid):
    """Return whether a process has ended; it may not have been waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_one_checkpoint_is_written_at_a_time(tmp_path):
    """The next save waits; so does a request to stop."""
    options = {"checkpoint.save_interval": 2, "training.train_iters": 5}
    for name, job in {
        "next": (saving_jobs.run_until_a_save_waits,),
        "stop": (saving_jobs.run_stopped, 2),
    }.items():
        run_dir = tmp_path / name
        run_dir.mkdir()
        function, *rest = job
        (printed,) = run_on_ranks(function, 1, arguments(run_dir, options), run_dir, *rest)
        lines = printed.splitlines()
        waiting = f"waiting for {checkpoint(run_dir, 2)}, which is still being written"
        at, last = lines.index(waiting), 3 if name == "stop" else 4
        assert lines[at + 1] == f"saved {checkpoint(run_dir, 2)}"
        saved = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
        assert saved[:2] == ["iter_0000002", f"iter_{last:07d}"]
        assert all(verify(run_dir / "checkpoints" / each).is_sealed for each in saved)


def test_a_divergence_waits_for_the_checkpoint_before_it(tmp_path):
    options = {"optimizer.lr": 1e30, "optimizer.clip_grad": 0.0, "checkpoint.save_interval": 2}
    with pytest.raises(RuntimeError, match="both must be finite"):
        run_on_ranks(saving_jobs.run_to_divergence, 1, arguments(tmp_path, options), tmp_path)
    (saved,) = (tmp_path / "checkpoints").iterdir()
    assert saved == checkpoint(tmp_path, 2) and not verify(saved).damages


def test_a_writer_that_fails_is_noticed_and_training_goes_on(tmp_path):
    options = {"checkpoint.save_interval": 2, "training.train_iters": 6}
    printed, _ = run_on_ranks(saving_jobs.run_with_failures, 2, arguments(tmp_path, options))
    killed, full = (line for line in printed.splitlines() if line.startswith("warning:"))
    assert f"{checkpoint(tmp_path, 2)} was not saved: rank 1: the process" in killed
    assert "was killed" in killed
    assert f"{checkpoint(tmp_path, 4)} was not saved: rank 1: [Errno 28] No space left" in full
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["iter_0000006"]
    assert len(metrics(tmp_path)) == 6


def test_ranks_share_what_they_all_hold(tmp_path):
    """Two replicas of the model: each rank writes about half of the bytes."""
    options = {"training.train_iters": 1, "checkpoint.save_interval": 0}
    run_on_ranks(saving_jobs.run, 2, arguments(tmp_path, options))
    sizes = [path.stat().st_size for path in sorted(checkpoint(tmp_path, 1).glob("*.distcp"))]
    assert len(sizes) == 2
    assert min(sizes) > 0.4 * sum(sizes)
