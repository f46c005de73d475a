"""What ``megapoly launch`` refuses before torchrun starts, and what it adds for torchrun."""

from __future__ import annotations

import gc
import socket
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
import torch.distributed as dist
from processes import wait_until

from megapoly.commands import launch
from megapoly.errors import LaunchError, PeerError
from megapoly.platform import launcher
from megapoly.platform.meeting import answers
from megapoly.preflight import hosts
from megapoly.preflight.host_meeting import HostMeeting


class Server:
    """A store of this process, which the launcher of host 0 finds by its port."""

    def __init__(self) -> None:
        self.store: dist.TCPStore | None = self._open(0)
        self.port = self.store.port

    def end(self) -> None:
        self.store = None
        wait_until(lambda: gc.collect() is None or not answers("127.0.0.1", self.port))

    def begin_again(self) -> None:
        self.store = self._open(self.port)

    @staticmethod
    def _open(port: int) -> dist.TCPStore:
        return dist.TCPStore(
            "127.0.0.1", port, None, is_master=True, wait_for_workers=False, multi_tenant=True
        )


@pytest.fixture
def server() -> Server:
    return Server()


def parse(text: str):
    return launch.build_parser().parse_args([*text.split(), "a.py"])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("--nproc-per-node 0", ["`--nproc-per-node` (0)", "1 to 1024"]),
        ("--nproc-per-node x", ["`--nproc-per-node` (x)"]),
        ("--nproc-per-node 010", ["`--nproc-per-node` (010)"]),
        ("--nproc-per-node 100000", ["`--nproc-per-node` (100000)", "1 to 1024"]),
        ("--nnodes 0", ["`--nnodes` (0)"]),
        ("--nnodes 4:2", ["`--nnodes` (4:2)", "LEAST:MOST"]),
        ("--nnodes 2 --node-rank 2", ["`--node-rank` (2)", "0 to 1"]),
        ("--master-port 65536", ["`--master-port` (65536)", "1 to 65535"]),
        ("--max-restarts -1", ["`--max-restarts` (-1)"]),
        ("--rdzv-conf x", ["`--rdzv-conf` (x)", "KEY=VALUE"]),
        ("--rdzv-endpoint a:b", ["`--rdzv-endpoint` (a:b)", "HOST:PORT"]),
        ("--nproc-per-node 0 --nnodes x", ["`--nproc-per-node` (0)", "`--nnodes` (x)"]),
    ],
)
def test_options_that_cannot_be_used(text, words) -> None:
    with pytest.raises(LaunchError) as error:
        hosts.check_options(parse(text))
    assert [word for word in words if word not in str(error.value)] == []


@pytest.mark.parametrize("text", ["", "--nproc-per-node 2", "--nnodes 1:4 --nproc-per-node auto"])
def test_options_that_can(text) -> None:
    hosts.check_options(parse(text))


@pytest.mark.parametrize(
    ("text", "added"),
    [
        ("--nproc-per-node 2", ["--local-addr=localhost"]),
        ("--local-addr 10.0.0.1", []),
        ("--nnodes 2 --master-addr a", ["--rdzv-conf=timeout=7"]),
        ("--nnodes 2 --rdzv-backend c10d --rdzv-endpoint a:1", ["--rdzv-conf=join_timeout=7"]),
        ("--nnodes 2 --master-addr a --rdzv-conf timeout=30", []),
        ("--nnodes 2 --master-addr a --rdzv-conf k=v", ["--rdzv-conf=k=v,timeout=7"]),
    ],
)
def test_what_is_added(monkeypatch, text, added) -> None:
    monkeypatch.setenv(launcher.JOIN_TIMEOUT, "7")
    assert hosts.added_options(parse(text)) == added


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("--nnodes 2 --node-rank 1 --master-addr nowhere.invalid", ["(nowhere.invalid)"]),
        ("--nnodes 2 --node-rank 1 --master-addr 127.0.0.1 --master-port CLOSED", ["host 0 at"]),
        ("--master-addr 127.0.0.1 --master-port USED", ["`--master-port` is in use"]),
        ("--nnodes 2 --rdzv-backend c10d --rdzv-endpoint nowhere.invalid:1", ["does not resolve"]),
    ],
)
def test_hosts_that_do_not_meet(monkeypatch, text, words) -> None:
    monkeypatch.setenv(launcher.JOIN_TIMEOUT, "1")
    with socket.create_server(("", 0)) as used, socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # and does not listen
        text = text.replace("USED", str(used.getsockname()[1]))
        text = text.replace("CLOSED", str(closed.getsockname()[1]))
        with pytest.raises(PeerError) as error:
            hosts.wait_for_hosts(parse(text))
    assert [word for word in words if word not in str(error.value)] == []


def test_the_command_says_it_in_one_line_with_status_2(capsys) -> None:
    assert launch.main(["--nproc-per-node", "0", "a.py"]) == 2
    assert capsys.readouterr().err.startswith("megapoly launch: `--nproc-per-node` (0) must be")


def launchers(*numbers: int, port: int, num_hosts: int, limit_s: float) -> list[Future[dist.Store]]:
    """Start the meeting of launchers with these numbers, each in a thread."""
    pool = ThreadPoolExecutor(len(numbers))
    meetings = [
        HostMeeting("127.0.0.1", port, "--master-addr", number=number, num_hosts=num_hosts)
        for number in numbers
    ]
    return [pool.submit(meeting.join, limit_s) for meeting in meetings]


def test_hosts_meet_at_the_store_that_torchrun_then_uses(server) -> None:
    stores = [
        each.result() for each in launchers(0, 1, 2, port=server.port, num_hosts=3, limit_s=600)
    ]
    stores[2].set("key", "value")
    assert server.store.get("megapoly/key") == b"value"


def test_hosts_that_never_come_are_named_on_all_others(server) -> None:
    errors = [
        str(each.exception())
        for each in launchers(0, 2, port=server.port, num_hosts=4, limit_s=2.0)
    ]
    for number, error in zip((0, 2), errors, strict=True):
        assert f"host {number} waited 2 s for the 4 hosts of `--nnodes`, and host 1, 3 did" in error


def test_a_launcher_that_is_started_again_waits_for_the_job_before(server, caplog) -> None:
    """Of a pod that was killed, say: the launchers of the others end some time after it."""
    before = launchers(0, 1, port=server.port, num_hosts=2, limit_s=600)
    stores = [each.result() for each in before]
    (again,) = launchers(1, port=server.port, num_hosts=2, limit_s=600)
    wait_until(lambda: "another launcher with `--node-rank` 1" in caplog.text)
    assert not again.done()
    before.clear()
    stores.clear()
    server.end()
    server.begin_again()
    first = launchers(0, port=server.port, num_hosts=2, limit_s=600)[0]
    again.result().set("key", "value")
    assert first.result().get("key") == b"value"


def test_two_launchers_with_one_number(server) -> None:
    both = launchers(0, 1, 1, port=server.port, num_hosts=2, limit_s=3.0)
    errors = [str(each.exception()) for each in both if each.exception()]
    assert len(errors) == 1
    assert f"another launcher has `--node-rank` 1, on {socket.gethostname()}" in errors[0]
