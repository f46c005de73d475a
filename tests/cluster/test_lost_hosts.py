"""Two hosts without a scheduler, a launcher on each: one is lost, and the same commands resume."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from hosts import Host, network
from processes import num_lines, wait_until
from tiny_runs import checkpoint_steps, job, rank_of, results, without_interruption

from megapoly.platform.launcher import HUNG, LOST_PEER

pytestmark = pytest.mark.cluster
NAMES = ("h1", "h2")
PORT = 29500  # of h1's own network
STOPPED, KILLED = 75, 128 + 9


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Host]]:
    with network(NAMES, tmp_path_factory.mktemp("hosts")) as made:
        yield made


def start(hosts: list[Host], run_dir: Path) -> list[subprocess.Popen[str]]:
    timeout = "--parallel.distributed_timeout_minutes=0.5"
    arguments = job(run_dir, "--checkpoint.save_interval=20", timeout)
    launchers = []
    for rank, host in enumerate(hosts):
        launch = ["megapoly-launch", "--nnodes=2", "--nproc-per-node=1", f"--node-rank={rank}"]
        launch += [f"--master-addr={NAMES[0]}", f"--master-port={PORT}"]
        variables = {"MEGAPOLY_STOPPED_STATUS": str(STOPPED)}
        log = run_dir.with_name(f"{host.name}.log")
        launchers.append(host.start([*launch, *arguments], variables, log=log))
    return launchers


def wait_for_steps(run_dir: Path, number: int, launchers: list[subprocess.Popen[str]]) -> None:
    def enough() -> bool:
        logs = [path.read_text() for path in run_dir.parent.glob("h?.log")]
        assert [launcher.poll() for launcher in launchers] == [None, None], logs
        return num_lines(run_dir / "metrics.jsonl") >= number

    wait_until(enough)


@pytest.mark.parametrize("fault", ["killed rank", "killed host", "cut link"])
def test_a_lost_peer_is_no_final_failure(tmp_path: Path, hosts: list[Host], fault: str) -> None:
    """Rank 0's host survives, and its status means "start again"."""
    run_dir = tmp_path / "run"
    launchers = start(hosts, run_dir)
    wait_for_steps(run_dir, 30, launchers)
    if fault == "killed rank":
        hosts[1].read("kill", "-9", str(rank_of(hosts[1], run_dir)))
    elif fault == "killed host":
        hosts[1].kill()
    else:
        hosts[1].cut()
    statuses = [launcher.wait() for launcher in launchers]
    hosts[1].plug()
    logs = [(tmp_path / f"{name}.log").read_text() for name in NAMES]
    if fault == "cut link":  # the watchers still meet on the disk, and may know first
        assert set(statuses) <= {HUNG, LOST_PEER}, logs
    else:
        assert statuses == [LOST_PEER, KILLED if fault == "killed rank" else -9], logs
    assert [host.find(str(run_dir)) for host in hosts] == [[], []]
    saved = checkpoint_steps(run_dir)[-1]

    launchers = start(hosts, run_dir)
    wait_for_steps(run_dir, saved + 1, launchers)
    wait_until(lambda: f"at step {saved}" in (tmp_path / "h1.log").read_text())
    at = len(results(run_dir)) + 1
    wait_for_steps(run_dir, at, launchers)
    for host in hosts:
        for pid in host.find("megapoly-launch", str(run_dir)):
            host.run(["kill", "-TERM", str(pid)])
    assert [launcher.wait() for launcher in launchers] == [STOPPED, STOPPED]
    steps = results(run_dir)
    assert steps == without_interruption(tmp_path / "alone", len(steps))
