"""Slurm as it is: munge, slurmctld and two slurmd on hosts of their own, 8 files each for GPUs."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from hosts import PACKAGES, ROOT, Host, missing_programs, network
from processes import wait_until

NODES = ("n1", "n2")
GPUS = 8  # of each node
SBATCH = ROOT / "examples/slurm/pretrain.sbatch"
_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue")
# A requeued job waits for as long as a credential holds, 120 s as Slurm is delivered. Two "cores"
# for a node, whatever the machine has. `main` is preempted by `high`, with time to save.
_CONF = """
ClusterName=tests
SlurmctldHost=control(10.77.0.1)
SlurmctldPort=16817
SlurmdPort=16818
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=10
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
SchedulerType=sched/backfill
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
KillWait=30
SlurmdTimeout=30
InactiveLimit=0
MinJobAge=3600
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
JobRequeue=1
NodeName=n1 NodeAddr=10.77.0.2 NodeHostname=n1 CPUs=2 RealMemory=1000 Gres=gpu:8 State=UNKNOWN
NodeName=n2 NodeAddr=10.77.0.3 NodeHostname=n2 CPUs=2 RealMemory=1000 Gres=gpu:8 State=UNKNOWN
PartitionName=main Nodes=n1,n2 Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=300
PartitionName=high Nodes=n1,n2 PriorityTier=10 PreemptMode=off
"""


class Cluster:
    """A running cluster.

    Args:
        hosts: of slurmctld and of the nodes.
        folder: for all of its files.
    """

    def __init__(self, hosts: Sequence[Host], folder: Path):
        self.control, self.nodes = hosts[0], {host.name: host for host in hosts[1:]}
        self.folder = folder
        self._conf = {"SLURM_CONF": str(folder / "slurm.conf")}

    def start(self) -> None:
        """Start the daemons, and wait until both nodes are idle."""
        for name in ("munge", "state", "spool", "run", "log", "gpus", "jobs"):
            (self.folder / name).mkdir()
        (self.folder / "slurm.conf").write_text(_CONF.format(folder=self.folder))
        files = f"{self.folder}/gpus/gpu[0-{GPUS - 1}]"
        gpus = f"NodeName=n[1-2] Name=gpu Flags=nvidia_gpu_env File={files}\n"
        (self.folder / "gres.conf").write_text(gpus)
        for number in range(GPUS):
            (self.folder / "gpus" / f"gpu{number}").touch()
        self._start_munge()
        self.call("slurmctld", "-c")
        for name in self.nodes:
            self.start_slurmd(name)
        self.wait_until_idle()

    def _start_munge(self) -> None:
        folder = self.folder / "munge"
        key = folder / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        files = {"socket": "socket", "key-file": "key", "pid-file": "pid", "log-file": "log"}
        files["seed-file"] = "seed"
        options = [f"--{option}={folder / name}" for option, name in files.items()]
        # --force: the folders of tests are their user's alone.
        self.control.read("munged", "--force", *options)

    def wait_until_idle(self) -> None:
        """Wait until no node has a job, and none is down."""
        wait_until(lambda: {"idle"} == set(self.call("sinfo", "-h", "-N", "-o", "%T").split()))

    def start_slurmd(self, name: str) -> None:
        """Start the daemon of a node."""
        status, output = self.nodes[name].run(["slurmd", "-N", name], self._conf)
        assert status == 0, output

    def run(
        self, *args: str, variables: Mapping[str, str] | None = None, cwd: Path = ROOT
    ) -> tuple[int, str]:
        """Return the status and output of a program on the login node, which is slurmctld's."""
        return self.control.run(args, self._conf | dict(variables or {}), cwd)

    def call(self, *args: str, variables: Mapping[str, str] | None = None, cwd: Path = ROOT) -> str:
        """Return the output of a program on the login node, which must end with status 0."""
        status, output = self.run(*args, variables=variables, cwd=cwd)
        assert status == 0, f"{args}: status {status}: {output}"
        return output

    def submit(
        self,
        *args: str,
        options: Sequence[str] = (),
        variables: Mapping[str, str] | None = None,
        cwd: Path = ROOT,
    ) -> Job:
        """Submit the job of ``examples/slurm`` with these arguments."""
        log = self.folder / "jobs" / "%j.log"
        command = ["sbatch", "--parsable", f"--output={log}", *options, str(SBATCH), *args]
        return Job(self, self.call(*command, variables=variables, cwd=cwd).strip())

    @contextmanager
    def without(self, name: str, *programs: str) -> Iterator[None]:
        """Hide programs of Slurm on a node."""
        files = [shutil.which(program) or program for program in programs]
        for file in files:
            self.nodes[name].read("mount", "--bind", "/dev/null", file)
        try:
            yield
        finally:
            for file in files:
                self.nodes[name].read("umount", file)

    def cancel_all(self) -> None:
        """End all jobs, also on a node that has failed; wait until both nodes are idle."""
        for name, host in self.nodes.items():
            if not host.find(f"slurmd -N {name}"):
                self.start_slurmd(name)
        self.call("scancel", "--user", "root")
        self.call("scancel", "--user", "root", "--signal", "KILL")
        self.wait_until_idle()


class Job:
    """A job of the cluster; a task of an array has a number like ``7_1``."""

    def __init__(self, cluster: Cluster, number: str):
        self._cluster, self.number = cluster, number

    @property
    def log(self) -> str:
        """What it has printed; a task of an array prints to the log of its own number."""
        number = self.shows("JobId")
        file = self._cluster.folder / "jobs" / f"{number}.log"
        return file.read_text() if file.exists() else ""

    def shows(self, field: str) -> str:
        """Return a field of ``scontrol show job``."""
        text = self._cluster.call("scontrol", "show", "job", self.number)
        return re.findall(rf"\b{field}=(\S+)", text)[0]

    @property
    def state(self) -> str:
        """As RUNNING, PENDING (requeued), COMPLETED."""
        return self.shows("JobState")

    @property
    def status(self) -> int:
        """Exit status of its batch script."""
        return int(self.shows("ExitCode").split(":")[0])

    def signal(self, name: str, *options: str) -> None:
        """Signal it, as to its batch script with ``--batch``."""
        self._cluster.call("scancel", "--signal", name, *options, self.number)

    def wait_for(self, *states: str) -> None:
        """Wait until it is in one of the states."""
        wait_until(lambda: self.state in states)

    def wait_for_log(self, text: str, count: int = 1) -> None:
        """Wait until it has printed a text so many times; fail if it ends before."""

        def printed() -> bool:
            ended = self.state in ("COMPLETED", "FAILED", "CANCELLED")
            found = self.log.count(text) >= count
            assert found or not ended, self.log
            return found

        wait_until(printed)


@contextmanager
def slurm_cluster(folder: Path) -> Iterator[Cluster]:
    """Bring Slurm up on hosts of its own, in ``folder``; end everything at the end."""
    if missing := missing_programs(*_PROGRAMS):
        raise RuntimeError(f"{', '.join(missing)} is missing: {PACKAGES}")
    with network(("control", *NODES), folder) as hosts:
        cluster = Cluster(hosts, folder)
        cluster.start()
        yield cluster
