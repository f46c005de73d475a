"""Processes that wait for each other, with real sockets and stores; limits are short."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest
import torch.distributed as dist

from megapoly.errors import LaunchError, PeerError
from megapoly.platform import launcher, meeting
from megapoly.preflight.local_ranks import environments
from megapoly.testing import run_on_ranks

VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch):
    """Set the variables of a launcher, and no others of them."""
    for name in (*VARIABLES, launcher.JOIN_TIMEOUT, "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(launcher.JOIN_TIMEOUT, "1")

    def set_variables(**variables: str) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_variables


@pytest.fixture
def port_of_another_program() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:  # accepts, and never answers
        yield server.getsockname()[1]


@pytest.fixture
def closed_port() -> Iterator[int]:
    with socket.socket() as closed:  # has the port, and does not listen
        closed.bind(("127.0.0.1", 0))
        yield closed.getsockname()[1]


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"RANK": "x"}, ["`RANK` (x) is not a whole number", "unset RANK"]),
        ({"RANK": "-1"}, ["`RANK` (-1) is not a whole number"]),
        ({"RANK": "9" * 5000}, ["is not a whole number"]),
        ({"RANK": "0", "WORLD_SIZE": "two"}, ["`WORLD_SIZE` (two) is not a whole number"]),
        ({"RANK": "2", "WORLD_SIZE": "2"}, ["`RANK` (2) is not below `WORLD_SIZE` (2)"]),
        ({"RANK": "0", "LOCAL_RANK": ""}, ["`LOCAL_RANK` () is not a whole number"]),
        ({"RANK": "0"}, ["`MASTER_ADDR`, the host of rank 0, is not set", "`MASTER_PORT`"]),
        (
            {"RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "x"},
            ["`MASTER_PORT` (x) is not a port"],
        ),
        ({"RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "65536"}, ["(65536) is not a port"]),
    ],
)
def test_variables_that_cannot_be_used(environment, variables, words) -> None:
    environment(**variables)
    with pytest.raises(LaunchError) as error:
        launcher.check(with_address=True)
    assert [word for word in words if word not in str(error.value)] == []
    assert len(str(error.value)) < 500


def test_without_a_launcher_nothing_is_asked(environment) -> None:
    launcher.check(with_address=True)


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "x", "", "9999999"])
def test_a_limit_that_cannot_be_used(environment, text) -> None:
    environment(**{launcher.JOIN_TIMEOUT: text})
    with pytest.raises(LaunchError, match="must be a whole number of seconds, 1 to 999999"):
        launcher.join_timeout_s()


def join(**variables: str) -> str:
    with pytest.raises(PeerError) as error:
        meeting.join()
    return str(error.value)


def test_without_rank_a_process_is_alone(environment) -> None:
    environment(LOCAL_RANK="1", WORLD_SIZE="2")
    assert (launcher.rank(), launcher.local_rank(), launcher.world_size()) == (0, 0, 1)


def test_a_name_without_address(environment) -> None:
    environment(RANK="1", WORLD_SIZE="2", MASTER_ADDR="nowhere.invalid", MASTER_PORT="29500")
    assert "`MASTER_ADDR` (nowhere.invalid) is a name that does not resolve" in join()


def test_nobody_answers(environment, closed_port) -> None:
    environment(RANK="1", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(closed_port))
    message = join()
    assert f"waited 1 s for rank 0 at 127.0.0.1:{closed_port}" in message
    assert "`MASTER_ADDR`" in message and launcher.JOIN_TIMEOUT in message


def test_a_port_in_use(environment, port_of_another_program) -> None:
    port = str(port_of_another_program)
    environment(RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    assert f"the port {port} of MASTER_ADDR:MASTER_PORT (127.0.0.1:{port}) is in use" in join()


def test_another_program_answers(environment, port_of_another_program) -> None:
    port = str(port_of_another_program)
    environment(RANK="1", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    assert f"(127.0.0.1:{port}) is not the store of this job" in join()


def test_processes_that_never_come_are_named(environment) -> None:
    with environments(12) as of_ranks:
        environment(**of_ranks[0])
        message = join()
    assert "waited 1 s for the 12 processes of WORLD_SIZE" in message
    assert "rank 1, 2, 3, 4, 5, 6, 7, 8 and 3 more did not join" in message


def joined() -> tuple[int, int]:
    store = meeting.join()
    dist.init_process_group(
        "gloo",
        store=dist.PrefixStore("torch", store),
        rank=launcher.rank(),
        world_size=launcher.world_size(),
    )
    try:
        return dist.get_rank(), dist.get_world_size()
    finally:
        dist.destroy_process_group()


def joined_twice() -> list[tuple[int, int]]:
    return [joined(), joined()]


def test_processes_that_come_meet_as_often_as_they_like() -> None:
    assert run_on_ranks(joined_twice, 3) == [[(rank, 3)] * 2 for rank in range(3)]
