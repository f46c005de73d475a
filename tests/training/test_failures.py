"""A failure is shown on the host where it happens, whichever rank it is, and once."""

from __future__ import annotations

import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from megapoly.errors import (
    CheckpointError,
    DivergenceError,
    LostPeerError,
    MegapolyError,
    PeerError,
)
from megapoly.platform import launcher
from megapoly.training import failures

CLOSED = RuntimeError(
    "[a/pair.cc:553] Connection closed by peer [127.0.0.1]:8085. This is typically caused by a "
    "remote worker crashing."
)
MISSING = CheckpointError("`iter_0000010/part_1` is missing")


@pytest.fixture
def store() -> dist.Store:
    return dist.HashStore()


def shown(
    store: dist.Store, capsys: pytest.CaptureFixture[str], rank: int, error: Exception
) -> str:
    """What rank R prints that fails; hosts have two ranks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RANK", str(rank))
        patch.setenv("LOCAL_RANK", str(rank % 2))
        with pytest.raises(type(error)), failures.shown_once(store):
            raise error
    assert not isinstance(error, MegapolyError) or error.is_shown
    return capsys.readouterr().err


def lost(
    store: dist.Store, capsys: pytest.CaptureFixture[str], rank: int, error: Exception = CLOSED
) -> str:
    """What rank R prints whose collective raises an error because of another rank."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RANK", str(rank))
        patch.setenv("LOCAL_RANK", str(rank % 2))
        with pytest.raises(LostPeerError) as caught, failures.shown_once(store):
            try:
                raise error
            except RuntimeError as inner:  # as the engine does while it saves
                raise ValueError("saving failed") from inner
    assert caught.value.is_shown
    return capsys.readouterr().err


def test_a_failure_of_another_than_the_first_rank_of_its_host(store, capsys) -> None:
    assert shown(store, capsys, 1, MISSING) == f"rank 1: {MISSING}\n"
    # What the others say about it adds nothing on that host; the other host shows it, once.
    repeated = PeerError(f"rank 1: {MISSING}")
    assert shown(store, capsys, 0, repeated) == ""
    assert shown(store, capsys, 3, repeated) == ""
    assert shown(store, capsys, 2, repeated) == f"rank 1: {MISSING}\n"


def test_who_repeats_a_failure_waits_for_the_one_that_has_it(store, capsys, monkeypatch) -> None:
    monkeypatch.setattr(failures, "_PATIENCE_S", 600.0)
    errors = [MISSING, PeerError(f"rank 0: {MISSING}")]
    with ThreadPoolExecutor() as pool, pytest.MonkeyPatch.context() as patch:
        patch.setattr(failures.launcher, "rank", lambda: int(threading.current_thread().name))
        patch.setattr(failures.launcher, "local_rank", failures.launcher.rank)
        second = pool.submit(fail_as, store, "1", errors[1])
        assert store.add("failures shown", 0) == 0
        pool.submit(fail_as, store, "0", errors[0]).result()
        second.result()
    assert capsys.readouterr().err == f"{MISSING}\n"


def fail_as(store: dist.Store, rank: str, error: MegapolyError) -> None:
    threading.current_thread().name = rank
    with pytest.raises(type(error)), failures.shown_once(store):
        raise error


def test_failures_of_their_own_are_all_shown(store, capsys) -> None:
    assert shown(store, capsys, 0, CheckpointError("a")) == "a\n"
    assert shown(store, capsys, 1, CheckpointError("b")) == "rank 1: b\n"
    assert shown(store, capsys, 3, CheckpointError("c")) == "rank 3: c\n"


def test_what_all_ranks_find_is_shown_once_on_each_host(store, capsys) -> None:
    printed = [shown(store, capsys, rank, DivergenceError("NaN")) for rank in (3, 1, 0, 2)]
    assert printed == ["rank 3: NaN\n", "", "NaN\n", ""]


def test_what_was_logged_at_the_start_is_not_repeated(store, capsys) -> None:
    store.set("failure", f"rank 1: {MISSING}")  # by RankZeroFirst, which logs it on this rank
    assert shown(store, capsys, 1, MISSING) == ""
    assert shown(store, capsys, 0, PeerError(f"rank 1: {MISSING}")) == ""


def test_a_store_that_is_gone(monkeypatch, capsys) -> None:
    class Gone:
        def add(self, key: str, amount: int) -> int:
            raise dist.DistNetworkError("connection reset")

    assert shown(Gone(), capsys, 1, MISSING) == f"rank 1: {MISSING}\n"


def test_other_errors_have_their_stack_trace_before_what_follows_from_them(store, capsys) -> None:
    printed = shown(store, capsys, 1, RuntimeError("a defect"))
    assert printed.startswith(
        "rank 1: RuntimeError: a defect\nTraceback (most recent call last):\n"
    )
    assert printed.count("Traceback") == 1 and printed.endswith("RuntimeError: a defect\n")
    # Ranks that lose it add nothing on that host; one of another host says which rank failed.
    assert lost(store, capsys, 0) == ""
    assert lost(store, capsys, 3) == "rank 3: rank 1 failed: RuntimeError: a defect\n"
    assert lost(store, capsys, 2) == ""


def test_a_data_worker_that_was_killed_is_one_sentence(store, capsys) -> None:
    error = RuntimeError("DataLoader worker (pid 4711) is killed by signal: Killed. ")
    printed = shown(store, capsys, 1, error)
    assert printed.startswith("rank 1: the data worker 4711 is killed by signal: Killed; ")
    assert printed.count("\n") == 1


def test_a_process_that_ends_without_a_message_is_noticed_once(store, capsys, monkeypatch) -> None:
    monkeypatch.setattr(failures, "_PATIENCE_S", 0.0)
    printed = lost(store, capsys, 1)
    assert printed.startswith("rank 1: another rank ended without a message")
    assert printed.endswith("(Connection closed by peer [127.0.0.1]:8085)\n")
    assert lost(store, capsys, 0) == ""


def test_a_collective_that_waits_too_long_names_the_option(store, capsys, monkeypatch) -> None:
    monkeypatch.setattr(failures, "_PATIENCE_S", 0.0)
    late = "[a/unbound_buffer.cc:81] Timed out waiting 60000ms for recv operation to complete"
    printed = lost(store, capsys, 0, RuntimeError(late))
    assert "`parallel.distributed_timeout_minutes`" in printed and "60000ms" in printed


def test_nothing_is_shown_without_an_error(store, capsys) -> None:
    with failures.shown_once(store):
        pass
    with pytest.raises(KeyboardInterrupt), failures.shown_once(store):
        raise KeyboardInterrupt
    assert not store.check(["first failure"]) and capsys.readouterr().err == ""


def test_a_store_that_is_gone_is_not_asked(monkeypatch, capsys) -> None:
    """A request to it prints frames of C++; the first process of each host says what it lost."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    printed = [lost(None, capsys, rank) for rank in (2, 3)]
    assert printed[0].startswith("another rank ended without a message") and printed[1] == ""


def test_a_lost_store_is_a_lost_peer_and_a_failed_peer_is_not(store, capsys, monkeypatch) -> None:
    monkeypatch.setattr(failures, "_PATIENCE_S", 0.0)
    gone = dist.DistNetworkError("failed to recv, got 0 bytes")
    assert "ended without a message" in lost(store, capsys, 0, gone)
    shown(store, capsys, 3, DivergenceError("NaN"))
    with pytest.raises(LostPeerError) as caught, failures.shown_once(store):
        raise CLOSED
    assert launcher.exit_status(caught.value) == launcher.DIVERGED
