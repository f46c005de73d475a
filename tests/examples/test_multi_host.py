"""A job on two hosts: network namespaces that a cable (a veth pair) joins, a launcher in each."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megapoly.platform.launcher import HUNG
from megapoly.testing import run_job
from megapoly.testing.jobs import shared_cache

pytestmark = pytest.mark.slow  # a cluster of two hosts
ROOT = Path(__file__).parents[2]
TUTORIAL = (ROOT / "docs" / "tutorials" / "laptop_to_cluster.md").read_text()
ADDRESSES = {"first": "198.51.100.1", "second": "198.51.100.2"}
CABLE = "cable0"  # name of the interface on either host

STEPS, LAYERS, SEQUENCE, HIDDEN, BATCH = 3, 2, 64, 64, 4
OPTIONS = {
    "model.num_layers": LAYERS,
    "model.hidden_size": HIDDEN,
    "model.activation_backend": "reference",
    "training.train_iters": STEPS,
    "training.seq_length": SEQUENCE,
    "training.micro_batch_size": 1,
    "training.global_batch_size": BATCH,
    "training.eval_interval": 0,
    "optimizer.lr_warmup_iters": 1,
    "optimizer.lr_decay_iters": 400,  # the same rates, however many steps are run
    "logging.tensorboard": False,
}
LAYOUT = {
    "parallel.tensor_model_parallel_size": 2,
    "parallel.expert_model_parallel_size": 2,
    "parallel.expert_tensor_parallel_size": 1,
}
NO_SAVE = {"checkpoint.save": False}


class Host:
    """A network namespace, in which processes also see a host's name and address book."""

    own_view = ("unshare", "--uts", "--mount")

    def __init__(self, name, folder):
        self.name, self.folder = name, folder
        self.namespace = f"megapoly-{os.getpid()}-{name}"
        self.log = folder / f"{name}.log"
        self.process = None

    def start(self, args, *, own_address=None, variables=None):
        """Start a program; `own_address` is the address of the host's own name on this host."""
        book = {"localhost": "127.0.0.1"} | ADDRESSES
        book[self.name] = own_address or ADDRESSES[self.name]
        hosts_file = self.folder / f"{self.name}.hosts"
        hosts_file.write_text("".join(f"{address} {name}\n" for name, address in book.items()))
        enter = 'mount --bind "$1" /etc/hosts && hostname "$2" && shift 2 && exec "$@"'
        shell = [*self.own_view, "sh", "-c", enter, "sh", str(hosts_file), self.name]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                ["ip", "netns", "exec", self.namespace, *shell, *args],
                cwd=ROOT,
                env=environment() | (variables or {}),
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def sent_bytes(self):
        counter = f"/sys/class/net/{CABLE}/statistics/tx_bytes"
        return int(run("ip", "netns", "exec", self.namespace, "cat", counter))

    def kill(self):
        """End what runs in the namespace; torchrun's workers are not in its process group."""
        while pids := run("ip", "netns", "pids", self.namespace).split():
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            time.sleep(0.1)
        if self.process is not None:
            self.process.wait()

    def remove(self):
        if Path("/run/netns", self.namespace).exists():
            self.kill()
            run("ip", "netns", "del", self.namespace)


def environment():
    """Return variables: PATH with this interpreter's scripts and sbin, no network interface."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"], "/usr/sbin"])
    inherited = {name: os.environ[name] for name in os.environ.keys() - {"GLOO_SOCKET_IFNAME"}}
    return inherited | {"PATH": path, "OMP_NUM_THREADS": "1"}


def run(*args):
    done = subprocess.run(args, env=environment(), check=True, capture_output=True, text=True)
    return done.stdout


def create(first, second):
    """Create the namespaces and the cable, or skip with the machine's error message."""
    try:
        for host in (first, second):
            run("ip", "netns", "add", host.namespace)
        ends = ["name", CABLE, "type", "veth", "peer", "name", CABLE, "netns", second.namespace]
        run("ip", "-n", first.namespace, "link", "add", *ends)
        run(*Host.own_view, "true")
    except FileNotFoundError as error:
        pytest.skip(f"this machine has no command `{error.filename}`")
    except subprocess.CalledProcessError as error:
        reason = error.stderr.strip() or f"status {error.returncode}"
        pytest.skip(f"not allowed on this machine: `{' '.join(error.cmd)}`: {reason}")


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hosts")
    hosts = [Host(name, folder) for name in ADDRESSES]
    try:
        create(*hosts)
        for host in hosts:
            run("ip", "-n", host.namespace, "link", "set", "lo", "up")
            run("ip", "-n", host.namespace, "link", "set", CABLE, "up")
            address = f"{ADDRESSES[host.name]}/24"
            run("ip", "-n", host.namespace, "address", "add", address, "dev", CABLE)
        yield hosts
    finally:
        for host in hosts:
            host.remove()


@pytest.fixture
def hosts(network):
    yield network
    for host in network:
        host.kill()


@pytest.fixture(scope="module")
def one_host(tmp_path_factory, network):
    run_dir = tmp_path_factory.mktemp("one-host")
    run_job("moe_tiny", run_dir, OPTIONS | LAYOUT | NO_SAVE, num_ranks=2)
    return results(run_dir)


def results(run_dir):
    """Return what the job computed in each step, without what it measured."""
    names = ("iteration", "lm_loss", "grad_norm", "load_balancing_loss")
    file = run_dir / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [{name: line[name] for name in names} for line in map(json.loads, lines)]


def start(hosts, launcher, run_dir, options, *, caches=None, **of_host):
    """Start the tutorial's line for a cluster on every host, for 2 of them with one process each.

    With `caches`, a folder, each host has a cache of its own in it, as on disks of their own.
    """
    line = re.search(r"^ *torchrun (--nnodes 8 .*)\\$", TUTORIAL, re.MULTILINE).group(1)
    line = line.replace("--nnodes 8", "--nnodes 2").replace("node 8", "node 1")
    args = line.replace("$FIRST_NODE", hosts[0].name).split()
    for host in hosts:
        cache = caches / host.name if caches else shared_cache().name
        settings = options | {"run_dir": run_dir, "data.cache_dir": cache}
        script = ["examples/pretrain_moe.sh", *(f"--{key}={settings[key]}" for key in settings)]
        host.start([launcher, *args, *script], **of_host)


def wait_until(condition, hosts):
    while not condition():
        if failed := [host.name for host in hosts if host.process.poll()]:
            logs = "\n".join(f"{host.name}: {host.log.read_text()[-6000:]}" for host in hosts)
            pytest.fail(f"failed: {failed}\n{logs}")
        time.sleep(0.1)


def wait_for_the_end(hosts):
    wait_until(lambda: all(host.process.poll() == 0 for host in hosts), hosts)


def least_bytes_of_attention():
    """Return the bytes that a rank sends to shard attention by heads and the rest by tokens.

    Its half of a sequence's hidden states (fp32) in the all-gather before attention, as much in the
    reduce-scatter after it, and both again backward. The rest of the model comes on top: 1.15 MB
    a step were seen. All that is sent besides steps, a checkpoint included, was below 0.1 MB.
    """
    half_sequence = SEQUENCE // 2 * HIDDEN * 4
    return STEPS * BATCH * LAYERS * 4 * half_sequence


def test_two_hosts_compute_what_one_does(tmp_path, hosts, one_host):
    run_dir = tmp_path / "run"
    sent_before = [host.sent_bytes() for host in hosts]
    start(hosts, "torchrun", run_dir, OPTIONS | LAYOUT, caches=tmp_path / "caches")
    wait_for_the_end(hosts)
    assert results(run_dir) == one_host
    for host in hosts:  # each built its own
        files = [path.suffix for path in (tmp_path / "caches" / host.name).rglob("*.*")]
        assert files.count(".bin") == 2 and files.count(".npy") == 4
    for host, before in zip(hosts, sent_before, strict=True):
        assert host.sent_bytes() - before > least_bytes_of_attention()

    checkpoint = run_dir / "checkpoints" / f"iter_{STEPS:07d}"
    for rank in (0, 1):
        assert list(checkpoint.glob(f"__{rank}_*.distcp"))
    # One process, by itself and from the hosts' checkpoint.
    more = OPTIONS | NO_SAVE | {"training.train_iters": STEPS + 1}
    run_job("moe_tiny", tmp_path / "alone", more)
    run_job("moe_tiny", run_dir, more)
    actual, expected = results(run_dir), results(tmp_path / "alone")
    assert len(actual) == len(expected) == STEPS + 1
    for a, b in zip(actual, expected, strict=True):
        assert a == pytest.approx(b, abs=2e-5)


def test_two_hosts_stop_together(tmp_path, hosts, one_host):
    """Their own names resolve to loopback, as on Debian: gloo needs the name of the interface."""
    run_dir = tmp_path / "run"
    options = OPTIONS | LAYOUT | {"training.train_iters": 400}
    interface = {"GLOO_SOCKET_IFNAME": CABLE}
    start(hosts, "megapoly-launch", run_dir, options, own_address="127.0.1.1", variables=interface)
    wait_until(lambda: len(results(run_dir)) >= 2, hosts)
    for host in hosts:
        host.process.terminate()
    wait_for_the_end(hosts)
    (checkpoint,) = (run_dir / "checkpoints").iterdir()
    steps = results(run_dir)
    assert checkpoint.name == f"iter_{len(steps):07d}"
    assert steps[:STEPS] == one_host[: len(steps)]


def pid_of_rank(host):
    """Return the process on a host that trains; the launcher and the watcher have no such name."""
    for pid in run("ip", "netns", "pids", host.namespace).split():
        command = Path("/proc", pid, "cmdline").read_bytes().split(b"\0")
        variables = Path("/proc", pid, "environ").read_bytes().split(b"\0")
        if any(each.startswith(b"RANK=") for each in variables) and (
            "megapoly.training.watchdog.watcher" not in (part.decode() for part in command)
        ):
            return int(pid)
    raise AssertionError(f"no rank on {host.name}")


@pytest.mark.parametrize("behind", [0, 1])
def test_a_hang_is_explained_on_both_hosts(tmp_path, hosts, behind):
    """The watchers meet in the run folder; a hang has its status on each host."""
    run_dir = tmp_path / "run"
    options = OPTIONS | LAYOUT | {"training.train_iters": 100_000, "parallel.hang_timeout_s": 20}
    start(hosts, "megapoly-launch", run_dir, options)
    wait_until(lambda: len(results(run_dir)) >= 3, hosts)
    stopped = pid_of_rank(hosts[behind])
    os.kill(stopped, signal.SIGSTOP)
    assert [host.process.wait() for host in hosts] == [HUNG, HUNG]
    for host in hosts:
        (line,) = [line for line in host.log.read_text().splitlines() if line[:6] == "hang: "]
        name = hosts[behind].name
        assert f"rank {behind} (pid {stopped} on {name}) is behind: stopped by SIGSTOP" in line
        assert f"; rank {1 - behind} waits in " in line and "of 2 of 2 ranks are in" in line
    (folder,) = (run_dir / "diagnostics").iterdir()
    assert "in run_schedule" in (folder / f"rank_{1 - behind}.stack").read_text()
