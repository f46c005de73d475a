"""What real Slurm does with a job of pretrain.sbatch, by how its launchers end and when."""

from __future__ import annotations

from pathlib import Path

import pytest
from processes import wait_until
from slurm_cluster import Cluster, Job

pytestmark = pytest.mark.cluster
SCRIPT = "examples/pretrain_dense.sh"
TWO_NODES = ["--nodes", "2"]
WAIT = {"STATUS_0": "wait", "STATUS_1": "wait"}


def is_requeued(job: Job) -> bool:
    """Return whether the job waits again; fail where it has neither ended nor been requeued."""
    wait_until(lambda: job.state in ("COMPLETED", "FAILED") or job.shows("Restarts") == "1")
    return job.shows("Restarts") == "1"


@pytest.mark.parametrize(
    "statuses, expected",
    [
        (("0", "0"), 0),
        (("75", "75"), None),
        (("5", "137"), None),  # rank 0 has lost a process of node 1
        (("killed", "5"), None),
        (("4", "4"), None),
        # The first is why; the other node has lost it.
        (("1", "5"), 1),
        (("5", "2"), 2),
        (("137", "1"), 1),
        (("3", "3"), 3),
        (("127", "5"), 127),  # no launcher there
    ],
)
def test_ends_that_another_start_helps(
    slurm: Cluster, checkout: Path, statuses: tuple[str, str], expected: int | None
) -> None:
    variables = dict(zip(("STATUS_0", "STATUS_1"), statuses, strict=True))
    job = slurm.submit(SCRIPT, options=TWO_NODES, variables=variables, cwd=checkout)
    if expected is None:
        assert is_requeued(job) and "back to the queue" in job.log, job.log
    else:
        assert not is_requeued(job) and job.status == expected, job.log
    if expected in (1, 2, 3):
        assert f"status {expected} is final" in job.log


def test_requeues_are_limited(slurm: Cluster, checkout: Path) -> None:
    variables = {"STATUS_0": "5", "STATUS_1": "5", "MAX_REQUEUES": "1"}
    job = slurm.submit(SCRIPT, options=TWO_NODES, variables=variables, cwd=checkout)
    assert is_requeued(job)
    job.wait_for("FAILED")
    assert job.status == 5 and "`MAX_REQUEUES` (1)" in job.log and "start 2," in job.log


def test_a_node_is_left_out(slurm: Cluster, checkout: Path) -> None:
    """By the command of docs/how-to/slurm.md, while the job waits for its next start."""
    variables = {"STATUS_0": "137", "MAX_REQUEUES": "1"}
    job = slurm.submit(SCRIPT, options=["--nodes", "1"], variables=variables, cwd=checkout)
    assert is_requeued(job)
    assert ", 1 nodes, 8 processes each, first n1:" in job.log
    slurm.call("scontrol", "update", f"JobId={job.number}", "ExcNodeList=n1")
    job.wait_for("FAILED")
    assert job.status == 137 and ", 1 nodes, 8 processes each, first n2:" in job.log


def test_less_time_than_the_signal_has(slurm: Cluster, checkout: Path) -> None:
    """Slurm signals such a job at once, whenever it starts: it must not return to the queue.

    Slurm 22.05 has no variable with the end; scontrol is asked or, on n1, squeue.
    """
    options = ["--time", "5"]
    with slurm.without("n1", "scontrol"):
        jobs = [
            slurm.submit(
                SCRIPT, options=[*options, "--nodelist", name], variables=WAIT, cwd=checkout
            )
            for name in ("n1", "n2")
        ]
        for job in jobs:
            assert not is_requeued(job) and job.status == 75, job.log
            assert "not requeued: its time is over as soon as it starts" in job.log


def test_signal_in_the_first_two_minutes(slurm: Cluster, checkout: Path) -> None:
    """One that is not due to the end of the job's time returns the job to the queue."""
    job = slurm.submit(SCRIPT, options=TWO_NODES, variables=WAIT, cwd=checkout)
    job.wait_for_log("ready", 2)
    job.signal("USR1", "--batch")
    assert is_requeued(job), job.log


def test_signal_at_a_time_that_nobody_tells(slurm: Cluster, checkout: Path) -> None:
    with slurm.without("n1", "scontrol", "squeue"):
        job = slurm.submit(SCRIPT, options=TWO_NODES, variables=WAIT, cwd=checkout)
        job.wait_for_log("ready", 2)
        job.signal("USR1", "--batch")
        assert not is_requeued(job) and job.status == 75
        assert "neither `SLURM_JOB_END_TIME`, scontrol nor squeue" in job.log


def test_preempted_in_the_first_two_minutes(slurm: Cluster, checkout: Path) -> None:
    """Little time is left then as well, and the job must return to the queue nevertheless."""
    options = [*TWO_NODES, "--time", "11", "--signal", "B:USR1@60"]
    job = slurm.submit(SCRIPT, options=options, variables=WAIT, cwd=checkout)
    job.wait_for_log("ready", 2)
    slurm.call("sbatch", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null",
               "--wrap=sleep 1")  # fmt: skip
    assert is_requeued(job) and "asking the run to save and stop" in job.log, job.log
    assert "not requeued" not in job.log


@pytest.mark.parametrize("options", [("TERM", "--batch"), ("USR1",), ("TERM",)])
def test_signals_by_hand(slurm: Cluster, checkout: Path, options: tuple[str, ...]) -> None:
    """TERM to the batch script ends the job for good; a signal to the steps requeues it."""
    job = slurm.submit(SCRIPT, options=TWO_NODES, variables=WAIT, cwd=checkout)
    job.wait_for_log("ready", 2)
    job.signal(*options)
    if "--batch" in options:
        assert not is_requeued(job) and job.status == 0 and "cancelled" in job.log, job.log
    else:
        assert is_requeued(job), job.log
