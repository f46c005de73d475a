"""Ranks that wait for one that builds: with a real store, on several hosts (by their numbers)."""

import datetime
import logging
import os
import re
import time
from pathlib import Path

import pytest
import torch.distributed as dist
from processes import wait_until

from megapoly.config import Config
from megapoly.errors import DataError, PeerError
from megapoly.testing import run_on_ranks
from megapoly.training import rank_zero_first as rank_zero_first_module
from megapoly.training.rank_zero_first import RankZeroFirst, wait_for_peers

BUILD = "build the sample indices of `cc`"


def rank_zero_first(
    *, ranks_per_host: int = 4, folder: str = "/nowhere", **changes
) -> RankZeroFirst:
    store, rank, world_size = next(
        dist.rendezvous("env://", timeout=datetime.timedelta(seconds=60))
    )
    # The ranks of a test start one after the other: wait for all.
    store.add("started", 1)
    while store.add("started", 0) < world_size:
        time.sleep(0.01)
    arguments = {"cache_dir": Path(folder), "timeout_s": 60.0, "log_every_s": 60.0} | changes
    return RankZeroFirst(
        dist.PrefixStore("test", store),
        rank=rank,
        world_size=world_size,
        local_rank=rank % ranks_per_host,
        **arguments,
    )


def build_once(folder: Path, *, wait_for: Path | None = None) -> str:
    """Return which rank built the file; each build leaves a file, by which builds are counted.

    Args:
        folder: of the file.
        wait_for: a file; the build goes on when it exists.
    """
    file = folder / "built"
    if not file.exists():
        (folder / f"attempt-{os.environ['RANK']}").touch()
        if wait_for is not None:
            wait_until(wait_for.exists)
        file.write_text(os.environ["RANK"])
    return file.read_text()


def logged(file: Path | None = None) -> list[str]:
    """Return a list to which lines of the log are added from now on; the first creates a file."""
    lines: list[str] = []

    def note(record: logging.LogRecord) -> None:
        lines.append(record.getMessage())
        if file is not None:
            file.touch()

    handler = logging.Handler()
    handler.emit = note
    logging.getLogger("megapoly").addHandler(handler)
    return lines


def slow(folder: str) -> tuple[str, list[str]]:
    """Build on rank 0 until rank 1 has said so; return what was built and what this rank logged."""
    said = Path(folder) / "said"
    lines = logged(said)
    with rank_zero_first(folder=folder, log_every_s=0.2) as order:
        built = order.run(BUILD, lambda: build_once(Path(folder), wait_for=said))
    return built, lines


def test_others_wait_for_rank_0_and_one_of_them_says_for_what(tmp_path):
    results = run_on_ranks(slow, 3, str(tmp_path))
    assert [built for built, _ in results] == ["0", "0", "0"]
    assert [path.name for path in tmp_path.glob("attempt*")] == ["attempt-0"]
    lines = [line for line in results[1][1] if "all ranks" not in line]
    assert lines
    pattern = (
        rf"rank 1 waits for rank 0 to {BUILD}: \d+ s so far, at most 60 s \(rank 0 is to {BUILD}\)"
    )
    assert all(re.fullmatch(pattern, line) for line in lines)
    assert not any(BUILD in line for line in results[0][1]) and results[2][1] == []


def failing(rank_that_fails: int, ranks_per_host: int) -> tuple[str, str]:
    rank = int(os.environ["RANK"])

    def build() -> None:
        if rank == rank_that_fails:
            raise DataError("`x.bin` has 7 bytes")

    try:
        with rank_zero_first(ranks_per_host=ranks_per_host) as order:
            order.run(BUILD, build)
    except (DataError, PeerError) as error:
        return type(error).__name__, str(error)
    raise AssertionError("no error")


@pytest.mark.parametrize(("rank", "ranks_per_host"), [(0, 4), (2, 2)])
def test_all_get_the_text_of_the_rank_that_failed_at_once(rank, ranks_per_host):
    results = run_on_ranks(failing, 4, rank, ranks_per_host)
    for other, (kind, text) in enumerate(results):
        own = other == rank
        assert kind == ("DataError" if own else "PeerError")
        assert text == ("`x.bin` has 7 bytes" if own else f"rank {rank}: `x.bin` has 7 bytes")


def late(folder: str) -> tuple[str, list[str]]:
    """Build on rank 0 until rank 1 has given up."""
    lines, given_up = logged(), Path(folder) / "given-up"
    try:
        with rank_zero_first(timeout_s=0.6) as order:
            order.run(BUILD, lambda: wait_until(given_up.exists))
            assert os.environ["RANK"] == "0"
    except PeerError as error:
        given_up.touch()
        return str(error), lines
    raise AssertionError("no error")


def test_a_time_out_says_who_waited_for_what_and_how_long(tmp_path):
    (of_rank_0, _), (of_rank_1, lines) = run_on_ranks(late, 2, str(tmp_path))
    assert lines == [f"rank 1: {of_rank_1}"]  # rank 0 may hang: it is said at once
    assert re.sub(r"waited \d+ s", "waited 1 s", of_rank_1) == (
        f"rank 1 waited 1 s for rank 0 to {BUILD}, longer than "
        f"`parallel.distributed_timeout_minutes` (0.01) allows; rank 0 was last to {BUILD}. If it "
        "is still working, raise the option; what is built until then is kept."
    )
    assert of_rank_0 == f"rank 1: {of_rank_1}"


def test_a_rank_waits_for_one_that_advances(monkeypatch):
    """With a clock of its own, that each look at the store moves by 0.4 of the limit."""
    store, now = dist.HashStore(), [0.0]
    monkeypatch.setattr(rank_zero_first_module.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(rank_zero_first_module.time, "sleep", lambda seconds: None)
    builder, waiting = (
        RankZeroFirst(
            store,
            rank=rank,
            world_size=2,
            local_rank=rank,
            cache_dir=Path("/nowhere"),
            timeout_s=10.0,
        )
        for rank in (0, 1)
    )

    def is_done(num_advances: int) -> bool:
        now[0] += 4.0
        looks.append(now[0])
        if len(looks) <= num_advances:
            builder.advance("a file")
        return len(looks) == 20

    looks: list[float] = []
    waiting._wait(lambda: is_done(18), "rank 0")
    assert looks[-1] == 80.0  # eight times the limit
    looks.clear()
    with pytest.raises(PeerError, match="rank 1 waited 24 s"):
        waiting._wait(lambda: is_done(2), "rank 0")


def on_hosts(folders: list[str]) -> str:
    """Build with two ranks a host, each host with its disk."""
    folder = Path(folders[int(os.environ["RANK"]) // 2])
    with rank_zero_first(ranks_per_host=2, folder=str(folder)) as order:
        return order.run(BUILD, lambda: build_once(folder))


@pytest.mark.parametrize(
    ("disks", "builders"),
    [
        # Each host has its own; two share one that rank 0 does not have; all share one.
        ("abc", {"a": {0}, "b": {2}, "c": {4}}),
        ("abb", {"a": {0}, "b": {2, 4}}),
        ("aaa", {"a": {0}}),
    ],
)
def test_one_process_builds_on_each_disk(tmp_path, disks, builders):
    folders = [tmp_path / disk for disk in disks]
    for folder in folders:
        folder.mkdir(exist_ok=True)
    built = run_on_ranks(on_hosts, 6, [str(folder) for folder in folders])
    for disk, possible in builders.items():
        (attempt,) = (tmp_path / disk).glob("attempt-*")
        assert int(attempt.name.removeprefix("attempt-")) in possible
        theirs = {built[rank] for rank in range(6) if disks[rank // 2] == disk}
        assert theirs == {attempt.name.removeprefix("attempt-")}


def asked(ranks_per_host: int) -> tuple[str, list[str], list[str]]:
    """Ask hosts; return what rank 0 told, the answers, and the questions that this rank had."""
    rank, questions = int(os.environ["RANK"]), []

    def answer(question: str) -> str:
        questions.append(question)
        return "" if rank == 2 else f"{question} {rank}"

    with rank_zero_first(ranks_per_host=ranks_per_host) as order:
        told = order.told("tell", lambda: f"by {rank}")
        answers = order.ask_hosts("ask", lambda: f"of {rank}", answer)
        assert order.ask_hosts("ask again", lambda: "", lambda question: question) == []
    return told, sorted(answers), questions


@pytest.mark.parametrize(
    ("ranks_per_host", "answers", "of_ranks"),
    [
        (2, ["of 0 4"], [2, 4]),
        (1, [f"of 0 {rank}" for rank in (1, 3, 4)], [1, 2, 3, 4]),
        (5, [], []),
    ],
)
def test_the_first_process_of_every_other_host_is_asked(ranks_per_host, answers, of_ranks):
    results = run_on_ranks(asked, 5, ranks_per_host)
    for rank, (told, found, questions) in enumerate(results):
        assert told == "by 0"
        assert found == (answers if rank == 0 else [])
        assert questions == (["of 0"] if rank in of_ranks else [])


def with_other_files() -> tuple[str, str]:
    rank = int(os.environ["RANK"])
    try:
        with rank_zero_first() as order:
            order.check_same("training data", "abc" if rank < 2 else "xyz")
    except (DataError, PeerError) as error:
        return type(error).__name__, str(error)
    raise AssertionError("no error")


def test_a_rank_with_other_files_ends_the_job():
    *others, (kind, text) = run_on_ranks(with_other_files, 3)
    assert kind == "DataError"
    assert "on rank 2 it has fingerprint xyz, on rank 0 abc" in text
    assert others == [("PeerError", f"rank 2: {text}")] * 2


@pytest.mark.parametrize(
    ("environment", "builder"),
    [({}, 5), ({"RANK": "5", "LOCAL_RANK": "2"}, 3), ({"RANK": "5", "LOCAL_RANK": "5"}, 0)],
)
def test_the_builder_of_a_host_is_its_first_process(monkeypatch, environment, builder):
    """Rank 5 of 8; without torchrun's variables it builds itself, holding the lock."""
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(dist, "get_rank", lambda: 5)
    monkeypatch.setattr(dist, "get_world_size", lambda: 8)
    order = RankZeroFirst.of_job(dist.HashStore(), Config())
    assert order._builder_of_host == builder
    assert order.timeout_s == 600.0  # `parallel.distributed_timeout_minutes`
    assert order._cache_dir == Path("runs/default/cache")


def test_a_process_alone_waits_for_nobody(tmp_path):
    order = RankZeroFirst(
        dist.HashStore(),
        rank=0,
        world_size=1,
        local_rank=0,
        cache_dir=tmp_path / "cache",
        timeout_s=1.0,
    )
    with order:
        assert order.run("build", lambda: 7) == 7
        order.check_same("data", "x")
    with pytest.raises(ZeroDivisionError), order:
        order.run("fail", lambda: 1 // 0)


def test_a_cache_that_cannot_be_locked_is_used_without(tmp_path):
    (tmp_path / "file").touch()
    order = RankZeroFirst(
        dist.HashStore(),
        rank=0,
        world_size=1,
        local_rank=0,
        cache_dir=tmp_path / "file" / "cache",
        timeout_s=1.0,
    )
    with order:
        assert order.run("build", lambda: 7) == 7


def test_peers_are_counted_and_not_waited_for_without_end():
    store = dist.HashStore()
    store.add("left", 1)
    wait_for_peers(store, "left", 2, timeout_s=5.0)
    assert store.add("left", 0) == 2
    wait_for_peers(store, "gone", 2, timeout_s=0.05)
    assert store.add("gone", 0) == 1
