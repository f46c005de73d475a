"""Jobs that are killed with SIGKILL, also while they save: no process is left, and they resume."""

import json

import killed_jobs
import pytest
from resuming_jobs import TINY

from megapoly.testing import run_on_ranks
from megapoly.testing.jobs import shared_cache


def arguments(run_dir, steps):
    options = TINY | {
        "run_dir": run_dir,
        "data.cache_dir": shared_cache().name,
        "data.num_workers": 1,
        "training.train_iters": steps,
        "checkpoint.save_interval": 1,
        "checkpoint.keep": 2,
        "parallel.distributed_timeout_minutes": 1,
    }
    return [f"--{name}={value}" for name, value in options.items()]


def no_process_is_left(run_dir, seeds, steps, num_ranks=2):
    """Kill a job once for each seed and finish it; compare its losses with one never killed."""
    argv = arguments(run_dir / "killed", steps)
    (left,) = run_on_ranks(
        killed_jobs.killed, 1, argv, str(run_dir / "killed"), seeds, num_ranks, timeout_s=3000.0
    )
    assert left == [f"{killed_jobs.KINDS[seed % 6]}: 0 left" for seed in seeds]
    assert run_on_ranks(killed_jobs.finished, 1, argv, num_ranks) == [0]
    whole = arguments(run_dir / "whole", steps)
    assert run_on_ranks(killed_jobs.finished, 1, whole, num_ranks) == [0]
    assert losses(run_dir / "killed") == losses(run_dir / "whole")
    assert not list((run_dir / "killed" / "checkpoints").glob(".iter*"))


def losses(run_dir):
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [(line["iteration"], line["lm_loss"], line["grad_norm"]) for line in lines]


def test_no_process_is_left_of_killed_jobs(tmp_path):
    no_process_is_left(tmp_path, seeds=[0, 3, 4, 5], steps=30)


@pytest.mark.parallel  # by hand: it takes ten minutes or more
@pytest.mark.timeout(3600)
def test_no_process_is_left_of_a_hundred_kills(tmp_path):
    no_process_is_left(tmp_path, seeds=list(range(100)), steps=400)
