"""Two hosts of a real job, each with mounts of its own: what they see under `run_dir` may differ.

A host is a mount namespace and a name; both share a network of their own. Needs root and iproute2.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from processes import names, num_lines
from tiny_jobs import TINY

from megapoly.checkpoints.verify import verify
from megapoly.platform.processes import dying_with_this_process

pytestmark = pytest.mark.cluster

ROOT = Path(__file__).parents[2]
HOSTS = """
ip link set lo up || exit 9
folder=$1 before=$2; shift 2
host() {
    unshare --uts --mount bash -c 'hostname "$1" && eval "$2" && shift 2 && exec "$@"' host \\
        "$2" "$3" megapoly-launch --nnodes 2 --nproc-per-node 1 --master-addr 127.0.0.1 \\
        --node-rank "$1" -m megapoly train "${@:4}" > "$folder/log$1" 2>&1
    echo $? > "$folder/status$1"
}
host 0 node-a true "$@" &
host 1 node-b "$before" "$@" &
wait
"""


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """The folder of a run: on the disk of node-a; node-b may have its own under the same path."""
    assert os.geteuid() == 0, f"mount namespaces need root, and this is user {os.geteuid()}"
    for program in ("ip", "unshare"):
        assert shutil.which(program), f"{program} is missing: apt-get install iproute2 util-linux"
    for name in ("run", "disk-of-b"):
        (tmp_path / name).mkdir()
    return tmp_path / "run"


def job(run_dir: Path, before: str, **changes: object) -> tuple[list[int], list[str]]:
    """Run a job on two hosts; return their launchers' statuses and output.

    Args:
        run_dir: of the run.
        before: commands of node-b before its launcher starts; RUN and OWN are its folders.
        changes: options of the job.
    """
    folder = run_dir.parent
    options = TINY | {"run_dir": run_dir, "training.train_iters": 4, "checkpoint.save_interval": 2}
    options |= {"data.cache_dir": folder / "cache"} | changes
    arguments = [
        "--config",
        "dense_tiny",
        *(f"--{name}={value}" for name, value in options.items()),
    ]
    namespaces = ["unshare", "--net", "--pid", "--mount-proc", "--fork", "--kill-child=KILL"]
    foreign = ("SLURM", "TORCH", "GLOO_", "NCCL_", "MEGAPOLY_", "PET_")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(foreign)} | {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": str(ROOT),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
        "RUN": str(run_dir),
        "OWN": str(folder / "disk-of-b"),
        "LOG": str(folder / "log1"),
    }
    subprocess.run(
        [*namespaces, "bash", "-c", HOSTS, "hosts", str(folder), before, *arguments],
        env=environment,
        cwd=folder,
        check=True,
        preexec_fn=dying_with_this_process(),
    )
    statuses = [int((folder / f"status{rank}").read_text()) for rank in range(2)]
    return statuses, [(folder / f"log{rank}").read_text() for rank in range(2)]


def saved(folder: Path) -> list[str]:
    return names(folder / "checkpoints", "*")


def test_a_disk_of_its_own_is_refused_before_the_first_step(run_dir: Path) -> None:
    # With a limit of the job by which the wait for the file ends after 15 s, and not after 60.
    statuses, logs = job(
        run_dir, 'mount --bind "$OWN" "$RUN"', **{"parallel.distributed_timeout_minutes": 0.5}
    )
    assert statuses == [2, 2], logs
    for log in logs:
        assert log.count("must be one folder that all hosts of the job see and can write to") == 1
        assert f"rank 1 on node-b has no folder {run_dir / 'checkpoints'}" in log
    assert num_lines(run_dir / "metrics.jsonl") == 0
    assert saved(run_dir) == [] and names(run_dir.parent / "disk-of-b", "*") == []


def test_a_disk_of_which_one_host_reads_only_is_refused(run_dir: Path) -> None:
    statuses, logs = job(run_dir, 'mount --bind "$RUN" "$RUN" && mount -o remount,bind,ro "$RUN"')
    assert statuses == [2, 2], logs
    wanted = f"rank 1 on node-b cannot write in {run_dir / 'checkpoints'} (Read-only file system)"
    assert all(log.count(wanted) == 1 for log in logs)
    assert num_lines(run_dir / "metrics.jsonl") == 0 and saved(run_dir) == []


def test_a_disk_that_is_mounted_late_is_waited_for(run_dir: Path) -> None:
    before = (
        'mount --bind "$OWN" "$RUN" && '
        '{ (until grep -q "waits to see" "$LOG"; do sleep 0.1; done; umount "$RUN") & }'
    )
    statuses, logs = job(run_dir, before)
    assert statuses == [0, 0], logs
    assert "rank 1 on node-b waits to see what rank 0 on node-a has written" in logs[1]
    assert saved(run_dir) == ["iter_0000002", "iter_0000004"]
    assert names(run_dir.parent / "disk-of-b", "*") == []


def test_without_saving_disks_of_their_own_are_enough(run_dir: Path) -> None:
    changes = {"checkpoint.save": False, "checkpoint.save_interval": 0}
    statuses, logs = job(run_dir, 'mount --bind "$OWN" "$RUN"', **changes)
    assert statuses == [0, 0], logs
    assert num_lines(run_dir / "metrics.jsonl") == 4


def test_a_common_disk_is_saved_to_and_resumed_from_at_any_path(run_dir: Path) -> None:
    """The second time node-b has mounted it elsewhere, with a link from the path of node-a."""
    assert job(run_dir, "true")[0] == [0, 0]
    elsewhere = (
        'mount --bind "$RUN" "$OWN" && mount -t tmpfs none "$RUN" && '
        'ln -s "$OWN/checkpoints" "$RUN/checkpoints"'
    )
    statuses, logs = job(run_dir, elsewhere, **{"training.train_iters": 6})
    assert statuses == [0, 0], logs
    assert "iter_0000004, at step 4" in logs[0]
    assert saved(run_dir) == ["iter_0000004", "iter_0000006"]
    assert not verify(run_dir / "checkpoints" / "iter_0000006").damages
