"""Hosts of a small network on this machine: namespaces on a bridge, each with its own processes.

A host has its own network, name, address book, mounts and process ids; it shares the files of the
machine, as hosts of a cluster share a disk. Several networks may exist at once, unseen by each
other, and a host ends with all that runs on it. Needs root.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import processes

from megapoly.platform.processes import dying_with_this_process

PACKAGES = "on Debian: apt-get install slurm-wlm munge iproute2 util-linux"
ROOT = Path(__file__).parents[2]
# The first process of a host. It collects orphans, and stays when all others are killed.
_INIT = """
mount --bind "$2" /etc/hosts && mount --bind "$3" /etc/nsswitch.conf && hostname "$1" &&
ip link set lo up && echo up && while :; do sleep infinity & wait; done
"""
_NAMESPACES = ("--net", "--uts", "--mount", "--pid")


class Host:
    """One host; :func:`network` makes it.

    Args:
        name: which all hosts of the network resolve.
        address: IPv4.
        folder: for its address book.
    """

    def __init__(self, name: str, address: str, folder: Path):
        self.name, self.address = name, address
        unshare = ["unshare", *_NAMESPACES, "--fork", "--kill-child=KILL", "--mount-proc"]
        files = [str(folder / "hosts"), str(folder / "nsswitch.conf")]
        self._unshare = subprocess.Popen(
            [*unshare, "bash", "-c", _INIT, "init", name, *files],
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=dying_with_this_process(),
        )
        processes.keep(self._unshare)
        assert self._unshare.stdout is not None and self._unshare.stderr is not None
        if self._unshare.stdout.readline() != "up\n":
            raise RuntimeError(f"host {name}: {self._unshare.stderr.read()}")
        children = Path(f"/proc/{self._unshare.pid}/task/{self._unshare.pid}/children")
        self.init = int(children.read_text())  # as seen from outside

    def command(self, args: Sequence[str], cwd: Path = ROOT) -> list[str]:
        """Return the command that runs ``args`` on this host, started from outside."""
        enter = ["nsenter", "--target", str(self.init), *_NAMESPACES]
        return [*enter, "env", f"--chdir={cwd}", *args]  # the mounts of another namespace: at /

    def start(
        self,
        args: Sequence[str],
        variables: Mapping[str, str] | None = None,
        *,
        log: Path | None = None,
        cwd: Path = ROOT,
    ) -> subprocess.Popen[str]:
        """Start a program on this host; its output goes to ``log``, or to a pipe."""
        with ExitStack() as files:
            output: Any = subprocess.PIPE if log is None else files.enter_context(log.open("w"))
            return subprocess.Popen(
                self.command(args, cwd),
                env=environment() | dict(variables or {}),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                text=True,
            )

    def run(
        self, args: Sequence[str], variables: Mapping[str, str] | None = None, cwd: Path = ROOT
    ) -> tuple[int, str]:
        """Return the status and output of a program on this host."""
        process = self.start(args, variables, cwd=cwd)
        output, _ = process.communicate()
        return process.returncode, output

    def read(self, *args: str) -> str:
        """Return the output of a program on this host, which must end with status 0."""
        status, output = self.run(args)
        assert status == 0, f"{args} on {self.name}: status {status}: {output}"
        return output

    def find(self, *words: str) -> list[int]:
        """Return the processes whose command has all the words; ids are those of the host."""
        found = []
        for line in self.read("ps", "-eo", "pid,args").splitlines()[1:]:
            pid, command = line.split(maxsplit=1)
            if all(word in command for word in words) and not command.startswith("ps -eo"):
                found.append(int(pid))
        return found

    def cut(self) -> None:
        """Unplug the host: nothing that is sent arrives, and nobody is told."""
        self.read("ip", "link", "set", "eth0", "down")

    def plug(self) -> None:
        """Plug the host in again."""
        self.read("ip", "link", "set", "eth0", "up")

    def kill(self) -> None:
        """Kill every process but the first, at once; its network closes their connections."""
        self.read("bash", "-c", "kill -9 -1")

    def remove(self) -> None:
        """End the host and all that runs on it."""
        self._unshare.kill()
        self._unshare.communicate()
        processes.keep(self._unshare, False)


@contextmanager
def network(names: Sequence[str], folder: Path) -> Iterator[list[Host]]:
    """Make hosts that reach each other; remove them at the end.

    Args:
        names: of the hosts; the bridge between them is the first one's.
        folder: for their address book.

    Raises:
        RuntimeError: this machine or user cannot have any; with what is missing.
    """
    _check_machine()
    addresses = [f"10.77.0.{number}" for number in range(1, len(names) + 1)]
    book = {"localhost": "127.0.0.1"} | dict(zip(names, addresses, strict=True))
    (folder / "hosts").write_text("".join(f"{book[name]} {name}\n" for name in book))
    (folder / "nsswitch.conf").write_text("passwd: files\ngroup: files\nhosts: files\n")
    with ExitStack() as held:
        hosts = []
        for name, address in zip(names, addresses, strict=True):
            hosts.append(Host(name, address, folder))
            held.callback(hosts[-1].remove)
        _connect(hosts)
        yield hosts


def _connect(hosts: Sequence[Host]) -> None:
    switch = hosts[0]
    switch.read("ip", "link", "add", "switch", "type", "bridge")
    switch.read("ip", "link", "set", "switch", "up")
    for number, host in enumerate(hosts):
        port = f"port{number}"
        # Moved from outside, where both hosts have a process id.
        create = ["ip", "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns"]
        enter = ["nsenter", "--target", str(switch.init), "--net"]
        subprocess.run([*enter, *create, str(host.init)], check=True, env=environment())
        switch.read("ip", "link", "set", port, "master", "switch", "up")
        host.read("ip", "address", "add", f"{host.address}/24", "dev", "eth0")
        host.plug()


def environment() -> dict[str, str]:
    """Return variables for programs on hosts, with this interpreter's scripts and one thread."""
    foreign = ("SLURM", "SBATCH", "PET_", "NCCL_", "TORCH", "UCX_", "GLOO_", "MEGAPOLY_", "PYTEST_")
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(foreign)}
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"], "/usr/sbin"])
    return inherited | {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def _check_machine() -> None:
    if os.geteuid() != 0:
        raise RuntimeError(f"hosts as namespaces need root, and this is user {os.geteuid()}")
    if missing := missing_programs("ip", "unshare", "nsenter"):
        raise RuntimeError(f"{', '.join(missing)} is missing: {PACKAGES}")


def missing_programs(*names: str) -> list[str]:
    """Return the programs that are not on the PATH of :func:`environment`."""
    return [name for name in names if shutil.which(name, path=environment()["PATH"]) is None]
