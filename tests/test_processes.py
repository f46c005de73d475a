"""Processes that a test leaves running end with it; folders can be listed while they change."""

import os
import subprocess
from pathlib import Path

import processes
import pytest
from processes import children, end_new_children, keep, names, num_lines, wait_until

SHELL = "echo begun; sleep 1000 & echo $!; wait"


@pytest.mark.parametrize("session", [False, True])
def test_a_process_and_its_children_end(session: bool) -> None:
    before = children()
    command = ["sh", "-c", SHELL]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=session)
    assert process.stdout is not None and process.stdout.readline() == b"begun\n"
    grandchild = int(process.stdout.readline())
    assert end_new_children(before) == [" ".join(command)]
    assert process.returncode == -9 and process.stdout.closed
    assert not Path(f"/proc/{grandchild}").exists()
    assert end_new_children(before) == []


def test_a_process_that_is_kept_stays_until_its_fixture_ends_it() -> None:
    before = children()
    process = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    keep(process)
    assert end_new_children(before) == []
    assert process.communicate("still here") == ("still here", None)
    keep(process, False)


def test_orphans_end_and_are_no_fault_of_the_test() -> None:
    before = children()
    done = subprocess.run(["sh", "-c", "sleep 1000 >&- & echo $!"], stdout=subprocess.PIPE)
    assert end_new_children(before) == []
    assert not Path(f"/proc/{int(done.stdout)}").exists()


def test_waiting_ends_with_the_process_and_its_output() -> None:
    process = subprocess.Popen(["sh", "-c", "echo why; exit 3"], stdout=subprocess.PIPE, text=True)
    with pytest.raises(pytest.fail.Exception, match="ended with status 3 before: why"):
        wait_until(lambda: False, process)


def test_a_folder_that_vanishes_has_no_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a.json", "b.json", "c.bin"):
        (tmp_path / name).write_text("1\n2")
    assert names(tmp_path, "*.json") == ["a.json", "b.json"]
    assert num_lines(tmp_path / "a.json") == 1
    assert names(tmp_path / "gone", "*") == [] and num_lines(tmp_path / "gone") == 0
    monkeypatch.setattr(processes.os, "listdir", lambda folder: os.scandir(folder / "gone"))
    assert names(tmp_path, "*") == []
