"""What ``megapoly launch`` refuses before torchrun starts, and what it adds for torchrun."""

from __future__ import annotations

import socket

import pytest

from megapoly.commands import launch
from megapoly.errors import LaunchError, PeerError
from megapoly.platform import launcher
from megapoly.preflight import hosts


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
