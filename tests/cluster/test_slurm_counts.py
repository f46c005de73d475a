"""What pretrain.sbatch starts on the nodes of a real cluster, by what the job asks for."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from slurm_cluster import GPUS, Cluster, Job

pytestmark = pytest.mark.cluster
SCRIPT = "examples/pretrain_dense.sh"


def calls(job: Job) -> list[str]:
    return re.findall(r"^called: (.*)$", job.log, re.MULTILINE)


@pytest.mark.parametrize(
    "options, variables, expected",
    [
        ([], {}, GPUS),
        (["--gpus-per-node", "4"], {}, 4),
        (["--gres", "gpu:4"], {}, 4),
        (["--gres", "none", "--gpus-per-task", "3"], {}, 3),
        (["--gres", "none", "--gpus", "2", "--nodes", "1"], {}, 2),
        (["--gres", "none"], {"NPROC_PER_NODE": "5"}, 5),
        (["--gres", "gpu:4"], {"NPROC_PER_NODE": "2"}, 2),
        (["--gres", "gpu:2", "--cpus-per-task", "1"], {}, 2),
    ],
)
def test_a_process_for_each_gpu_of_the_job(
    slurm: Cluster, checkout: Path, options: list[str], variables: dict[str, str], expected: int
) -> None:
    """The nodes are the job's alone: its batch script sees all 8 GPUs, whatever it asked for."""
    options = ["--nodes", "2", *options]
    job = slurm.submit(SCRIPT, "--x y", options=options, variables=variables, cwd=checkout)
    job.wait_for("COMPLETED", "FAILED")
    num_nodes = int(job.shows("NumNodes"))
    port = 20000 + int(job.number) % 10000
    assert sorted(calls(job)) == [
        f"--node-rank {rank} --nnodes {num_nodes} --nproc-per-node {expected} --master-addr n1 "
        f"--master-port {port} {SCRIPT} --x y"
        for rank in range(num_nodes)
    ], job.log


def test_uneven_gpus_are_refused(slurm: Cluster, checkout: Path) -> None:
    """Slurm spreads a sum as it likes: 3 and 1, where 2 nodes are given 4."""
    options = ["--nodes", "2", "--gres", "none", "--gpus", "4"]
    job = slurm.submit(SCRIPT, options=options, cwd=checkout)
    job.wait_for("FAILED")
    assert job.status == 2 and calls(job) == [], job.log
    (line,) = [line for line in job.log.splitlines() if line.startswith("pretrain.sbatch: ")]
    numbers = re.search(r"\(n1 (\d), n2 (\d)\)", line)
    assert numbers is not None and sum(map(int, numbers.groups())) == 4
    assert "--gpus-per-node" in line


def test_a_port_in_use(slurm: Cluster, checkout: Path) -> None:
    """The port of the job's number is passed over; one that is asked for is refused."""
    job = slurm.submit(SCRIPT, options=["--nodes", "1", "--hold", "--nodelist", "n1"], cwd=checkout)
    port = 20000 + int(job.number) % 10000
    listen = f"import socket; s = socket.create_server(('', {port})); print(s, flush=True); input()"
    holder = slurm.nodes["n1"].start(["sh", "-c", f'tail -f /dev/null | python3 -c "{listen}"'])
    assert holder.stdout is not None and holder.stdout.readline()
    try:
        slurm.call("scontrol", "release", job.number)
        job.wait_for("COMPLETED", "FAILED")
        assert [re.findall(r"--master-port (\d+)", call) for call in calls(job)] == [
            [str(port + 1)]
        ], job.log
        asked = {"MASTER_PORT": str(port)}
        job = slurm.submit(SCRIPT, options=["--nodelist", "n1"], variables=asked, cwd=checkout)
        job.wait_for("COMPLETED", "FAILED")
        assert job.status == 2 and f"`MASTER_PORT` ({port}) is in use on n1" in job.log
    finally:
        for pid in slurm.nodes["n1"].find("tail -f /dev/null") + slurm.nodes["n1"].find(listen):
            slurm.nodes["n1"].run(["kill", "-9", str(pid)])
        holder.communicate()


def test_nodes_are_found_without_scontrol(slurm: Cluster, checkout: Path) -> None:
    """As in a container without it; the job says that it cannot return to the queue."""
    stopped = {"STATUS_0": "75", "STATUS_1": "75"}
    with slurm.without("n1", "scontrol"):
        job = slurm.submit(SCRIPT, options=["--nodes", "2"], variables=stopped, cwd=checkout)
        job.wait_for("FAILED", "COMPLETED", "PENDING")
        job.wait_for("FAILED", "COMPLETED")
    assert len(calls(job)) == 2 and job.status == 75
    assert "not requeued by scontrol" in job.log


@pytest.mark.parametrize(
    "command, expected",
    [
        (["bash"], "this is a job for sbatch"),
        (["srun", "--nodes", "1", "bash"], "srun starts this once for each task"),
        (["salloc", "--quiet", "--nodes", "2", "bash"], "not a command in the shell of salloc"),
    ],
)
def test_another_start_is_refused(
    slurm: Cluster, checkout: Path, command: list[str], expected: str
) -> None:
    status, output = slurm.run(*command, "examples/slurm/pretrain.sbatch", SCRIPT, cwd=checkout)
    lines = [line for line in output.splitlines() if not line.startswith("srun: error: ")]
    assert status == 2 and len(lines) == 1 and expected in lines[0], output


def test_a_container_needs_its_program(slurm: Cluster, checkout: Path) -> None:
    """Neither pyxis nor Apptainer is in Debian; `srun` says whether it has pyxis."""
    for image, expected in [("a.sqsh", "srun has no --container-image"), ("a.sif", "neither")]:
        variables = {"CONTAINER": image}
        job = slurm.submit(SCRIPT, options=["--nodes", "2"], variables=variables, cwd=checkout)
        job.wait_for("FAILED", "COMPLETED")
        assert job.status == 2 and calls(job) == []
        assert f"`CONTAINER` ({image})" in job.log and expected in job.log
