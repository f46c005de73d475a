"""Runs that train under real Slurm, and meet what a cluster does to them."""

from __future__ import annotations

from pathlib import Path

import pytest
from processes import num_lines, wait_until
from slurm_cluster import Cluster, Job
from tiny_runs import checkpoint_steps, job, rank_of, results, without_interruption

pytestmark = pytest.mark.cluster
OPTIONS = ["--gres", "gpu:1", "--time", "24:00:00"]


def wait_for_steps(run_dir: Path, number: int, running: Job) -> None:
    def enough() -> bool:
        assert running.state == "RUNNING", running.log
        return num_lines(run_dir / "metrics.jsonl") >= number

    wait_until(enough)


def kill_rank(slurm: Cluster, node: str, run_dir: Path) -> None:
    """Kill a process as the system does where memory runs out."""
    slurm.nodes[node].read("kill", "-9", str(rank_of(slurm.nodes[node], run_dir)))


def wait_for_requeue(running: Job, number: int) -> None:
    """Wait until the job waits for its next start, and has been requeued so many times."""

    def waits() -> bool:
        state = running.state
        assert state not in ("COMPLETED", "FAILED", "CANCELLED"), running.log
        return state == "PENDING" and running.shows("Restarts") == str(number)

    wait_until(waits)


def test_a_run_survives_its_interruptions(tmp_path: Path, slurm: Cluster) -> None:
    """A killed rank, the end of the job's time, a node that fails, and an end for good.

    To the bit it is the run that nothing interrupts.
    """
    run_dir = tmp_path / "run"
    arguments = job(run_dir, "--checkpoint.save_interval=20")
    running = slurm.submit(*arguments, options=["--nodes", "2", *OPTIONS])
    running.wait_for_log("saved ")
    wait_for_steps(run_dir, 30, running)
    kill_rank(slurm, "n2", run_dir)
    wait_for_requeue(running, 1)
    assert "lost a process or a node" in running.log

    running.wait_for_log("at step", 1)
    at = len(results(run_dir)) + 10
    wait_for_steps(run_dir, at, running)
    running.signal("USR1", "--batch")
    wait_for_requeue(running, 2)
    assert checkpoint_steps(run_dir)[-1] == len(results(run_dir))

    running.wait_for_log("at step", 2)
    at = len(results(run_dir)) + 30
    wait_for_steps(run_dir, at, running)
    slurm.nodes["n2"].kill()
    wait_for_requeue(running, 3)
    slurm.start_slurmd("n2")
    running.wait_for_log("at step", 3)
    running.signal("TERM", "--batch")
    running.wait_for("COMPLETED", "FAILED")
    assert running.status == 0, running.log
    steps = results(run_dir)
    assert checkpoint_steps(run_dir)[-1] == len(steps)
    assert steps == without_interruption(tmp_path / "alone", len(steps))


def test_one_job_at_a_time_trains_in_a_folder(tmp_path: Path, slurm: Cluster) -> None:
    """Two tasks of an array with one `run_dir`; a job that is submitted while another waits."""
    run_dir = tmp_path / "run"
    arguments = job(run_dir, "--checkpoint.save_interval=20")
    options = ["--nodes", "1", *OPTIONS]
    number = slurm.submit(*arguments, options=[*options, "--array", "0-1"]).number
    tasks = [Job(slurm, f"{number}_{task}") for task in (0, 1)]
    wait_until(lambda: "FAILED" in [task.state for task in tasks])
    refused, first = sorted(tasks, key=lambda task: task.state)
    assert refused.status == 2 and "not requeued: status 2 is final" in refused.log
    assert f"Slurm job {first.number}" in refused.log and "holds its lock" in refused.log
    first.wait_for_log("saved ")
    node = first.shows("BatchHost")
    kill_rank(slurm, node, run_dir)
    wait_for_requeue(first, 1)

    second = slurm.submit(*arguments, options=options)
    second.wait_for("RUNNING")
    at = len(results(run_dir)) + 1
    wait_for_steps(run_dir, at, second)
    first.wait_for("FAILED", "COMPLETED")
    assert first.status == 2 and f"Slurm job {second.number}" in first.log
    assert first.shows("Restarts") == "1"

    at = len(results(run_dir)) + 1
    wait_for_steps(run_dir, at, second)
    slurm.call("scancel", second.number)
    second.wait_for("CANCELLED")
    wait_until(lambda: not slurm.call("squeue", "-h"))  # the steps have ended
    assert checkpoint_steps(run_dir)[-1] == len(results(run_dir))


def test_a_run_that_makes_no_progress_ends(tmp_path: Path, slurm: Cluster) -> None:
    """The third start from one step that loses a rank is the last; so it is not for ever."""
    run_dir = tmp_path / "run"
    running = slurm.submit(
        *job(run_dir, "--checkpoint.save_interval=100000"), options=["--nodes", "1", *OPTIONS]
    )
    for start in (1, 2, 3):
        running.wait_for_log("dense, 2 layers", start)
        kill_rank(slurm, running.shows("BatchHost"), run_dir)
        if start < 3:
            wait_for_requeue(running, start)
    running.wait_for("FAILED", "COMPLETED")
    assert running.status == 1 and "not to be started again by itself" in running.log
    assert "not requeued: status 1 is final" in running.log
