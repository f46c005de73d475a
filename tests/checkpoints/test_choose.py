"""The newest checkpoint that is whole is taken; damaged ones are named, and set aside to resume."""

from __future__ import annotations

import functools
import json
import logging
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from made_checkpoints import make_checkpoint

from megapoly.checkpoints import choose
from megapoly.checkpoints.choose import (
    check_whole,
    make_room,
    newest_description,
    newest_ordinary,
    newest_to_resume,
    newest_whole,
    set_aside,
)
from megapoly.checkpoints.run_folder import checkpoint_path
from megapoly.checkpoints.verify import Ranks
from megapoly.errors import CheckpointError


@pytest.fixture
def run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Iterator[Path]:
    """A run with checkpoints of steps 3, 6 and 9."""
    caplog.set_level(logging.WARNING, logger="megapoly")
    first = make_checkpoint(checkpoint_path(tmp_path, 3))
    for step in (6, 9):
        shutil.copytree(first, checkpoint_path(tmp_path, step))
    return tmp_path


def flip(path: Path) -> None:
    data = path.read_bytes()
    middle = len(data) // 2
    path.write_bytes(data[:middle] + bytes([data[middle] ^ 8]) + data[middle + 1 :])


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_the_newest_that_is_whole_is_taken(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert newest_whole(run) == checkpoint_path(run, 9) and not caplog.messages
    flip(checkpoint_path(run, 9) / "__0_1.distcp")
    (checkpoint_path(run, 6) / "run.json").unlink()
    before = names(run)
    assert newest_whole(run) == checkpoint_path(run, 3)
    assert names(run) == before
    assert [line.partition("checkpoints/")[2] for line in caplog.messages] == [
        "iter_0000009 is damaged: __0_1.distcp is damaged (another CRC-32 than when it was "
        f"written). {checkpoint_path(run, 3)} is used instead",
        f"iter_0000006 is damaged: run.json is missing. {checkpoint_path(run, 3)} is used instead",
    ]


def test_resuming_sets_damaged_ones_aside(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    flip(checkpoint_path(run, 9) / ".metadata")
    checkpoint_path(run, 12).mkdir()  # left by a crash
    checkpoint_path(run, 15).write_text("a file")
    assert newest_to_resume(run) == checkpoint_path(run, 6)
    assert names(run) == [
        "iter_0000003",
        "iter_0000006",
        "iter_0000009.damaged",
        "iter_0000012.damaged",
        "iter_0000015.damaged",
    ]
    assert "It is set aside as iter_0000009.damaged" in caplog.text
    shutil.copytree(checkpoint_path(run, 6), checkpoint_path(run, 9))
    flip(checkpoint_path(run, 9) / "common.pt")
    assert newest_to_resume(run) == checkpoint_path(run, 6)
    assert "iter_0000009.damaged.2" in names(run)


def test_a_run_without_a_whole_one_is_refused_and_kept(run: Path) -> None:
    """Otherwise the next start would train from the beginning."""
    for step in (3, 6, 9):
        flip(checkpoint_path(run, step) / "config.yaml")
    before = names(run)
    for find in (newest_whole, newest_to_resume):
        with pytest.raises(CheckpointError, match="All 3 checkpoints .* config.yaml is damaged"):
            find(run)
    assert names(run) == before


def test_a_run_without_checkpoints_has_none(tmp_path: Path) -> None:
    assert newest_whole(tmp_path) is None and newest_to_resume(tmp_path) is None
    checkpoint_path(tmp_path, 3).mkdir(parents=True)  # the first save was not finished
    assert newest_whole(tmp_path) is None and newest_to_resume(tmp_path) is None
    assert newest_description(tmp_path) == {}


def test_one_that_is_deleted_meanwhile_is_not_damaged(
    run: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the run itself, which trains on."""
    verify = choose.verify

    def slowly(folder: Path, *args: Any) -> Any:
        if folder == checkpoint_path(run, 9):
            shutil.rmtree(folder)
        return verify(folder, *args)

    monkeypatch.setattr(choose, "verify", slowly)
    assert newest_whole(run) == checkpoint_path(run, 6) and not caplog.messages


def test_a_folder_that_is_named_must_be_whole(run: Path) -> None:
    named = checkpoint_path(run, 9)
    check_whole(named)
    flip(named / "tokenizer/tokenizer.json")
    with pytest.raises(CheckpointError, match="tokenizer.json is damaged .* Give another"):
        check_whole(named)
    with pytest.raises(CheckpointError, match="no run.json"):
        check_whole(run)


def test_a_checkpoint_is_verified_once_unless_it_changes(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    verified = []
    verify = choose.verify
    monkeypatch.setattr(choose, "verify", lambda *args: verified.append(args) or verify(*args))
    for _ in range(3):
        check_whole(checkpoint_path(run, 9))
    assert len(verified) == 1
    flip(checkpoint_path(run, 9) / ".metadata")
    with pytest.raises(CheckpointError):
        check_whole(checkpoint_path(run, 9))


def test_what_is_in_the_way_of_a_save_is_renamed(run: Path) -> None:
    path = checkpoint_path(run, 12)
    make_room(path)
    path.symlink_to("nowhere")
    make_room(path)
    path.mkdir()
    make_room(path)
    assert names(run)[3:] == ["iter_0000012.damaged", "iter_0000012.damaged.2"]


def test_checkpoints_without_crcs_are_used_with_a_line(
    run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    newest = checkpoint_path(run, 9)
    (newest / "run.json").write_text(json.dumps({"iteration": 9}))
    for _ in range(2):
        assert newest_whole(run) == newest
    assert caplog.messages == [
        f"{newest} is not verified: its run.json has no sizes and CRC-32 of its files"
    ]


def test_a_table_takes_the_newest_run_json_that_is_whole(
    run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    flip(checkpoint_path(run, 9) / "run.json")
    flip(checkpoint_path(run, 9) / "common.pt")
    assert newest_description(run)["iteration"] == 6
    assert "iter_0000009 is damaged: run.json is damaged" in caplog.text


def test_newest_with_an_ordinary_loss(tmp_path: Path) -> None:
    """One that does not say so is ordinary; one whose ``run.json`` is damaged is not."""
    assert newest_ordinary(tmp_path) is None
    texts = ["{}", '{"is_ordinary": true}', '{"is_ordinary": false}', "damaged"]
    expected = [1, 2, 2, 2]
    for step, (text, newest) in enumerate(zip(texts, expected, strict=True), start=1):
        path = checkpoint_path(tmp_path, step)
        path.mkdir(parents=True)
        (path / "run.json").write_text(text)
        assert newest_ordinary(tmp_path) == checkpoint_path(tmp_path, newest)


def test_what_is_set_aside_replaces_nothing(tmp_path: Path) -> None:
    path = tmp_path / "iter_0000012"
    for name in ("iter_0000012.set_aside", "iter_0000012.set_aside.2"):
        path.mkdir()
        assert set_aside(path, "set_aside") == f"It is set aside as {name}"
        assert (tmp_path / name).is_dir() and not path.exists()


def on_two_ranks(function: Any, of_ranks: list[Any]) -> list[Any]:
    """Call a function with what each rank sees, in a thread each; return results or errors."""
    given: list[Any] = [None, None]
    barrier = threading.Barrier(2)

    def gather(rank: int, own: Any) -> list[Any]:
        given[rank] = own
        barrier.wait()
        gathered = list(given)
        barrier.wait()
        return gathered

    def call(rank: int) -> Any:
        try:
            return function(of_ranks[rank], Ranks(rank, 2, functools.partial(gather, rank)))
        except CheckpointError as error:
            return error

    with ThreadPoolExecutor() as pool:
        return list(pool.map(call, range(2)))


@pytest.mark.parametrize("lost", ["common.pt", "run.json", "."])
def test_what_another_host_does_not_see_is_refused_and_not_set_aside(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    monkeypatch.setattr(choose, "SEEN_WITHIN_S", 0.0)
    other = tmp_path / "other"
    shutil.copytree(run / "checkpoints", other / "checkpoints")
    (checkpoint_path(other, 9) / lost).rename(other / "lost")
    errors = on_two_ranks(newest_to_resume, [run, other])
    assert all(isinstance(error, CheckpointError) for error in errors)
    assert "must be the same checkpoint on all hosts" in str(errors[0])
    assert "rank 1 on" in str(errors[0]) and str(errors[0]).partition("is another")[2] in str(
        errors[1]
    )
    assert names(run) == ["iter_0000003", "iter_0000006", "iter_0000009"]
    named = [checkpoint_path(each, 9) for each in (run, other)]
    errors = on_two_ranks(check_whole, named)
    assert all("must be the same checkpoint on all hosts" in str(error) for error in errors)


def test_what_another_host_sees_late_is_waited_for(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choose, "SEEN_WITHIN_S", 600.0)
    other = tmp_path / "other"
    shutil.copytree(run / "checkpoints", other / "checkpoints")
    late = checkpoint_path(other, 9).rename(other / "late")
    wait = choose.wait_until_seen

    def appear(folder: Path, sizes: Any, limit_s: float) -> dict[str, str]:
        if folder == checkpoint_path(other, 9):
            assert not folder.exists()
            threading.Timer(0.3, late.rename, [folder]).start()
        return wait(folder, sizes, limit_s)

    monkeypatch.setattr(choose, "wait_until_seen", appear)
    found = on_two_ranks(newest_to_resume, [run, other])
    assert found == [checkpoint_path(run, 9), checkpoint_path(other, 9)]


def test_ranks_take_the_checkpoints_of_rank_0_at_their_own_path(run: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(run)
    found = on_two_ranks(newest_whole, [run, link])
    assert found == [checkpoint_path(run, 9), checkpoint_path(link, 9)]
