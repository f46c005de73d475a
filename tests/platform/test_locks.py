"""Locks between processes: real ones, and file systems that have none."""

import errno
import fcntl
import os
import signal

import pytest

from megapoly.platform.locks import at_most, locked


class TakenError(Exception):
    pass


def now(file):
    return TakenError(file.seek(0) or file.read())


def test_one_process_holds_it_and_may_leave_a_note(tmp_path):
    path = tmp_path / "new" / "lock"
    with locked(path, at_most(0.0, now)) as lock:
        assert lock.missing == ""
        lock.file.write("mine")
        lock.file.flush()
        with pytest.raises(TakenError, match="mine"), locked(path, at_most(0.0, now)):
            pass
    with locked(path, at_most(0.0, now)):
        assert path.read_text() == "mine"


def test_it_is_waited_for_by_any_condition(tmp_path):
    turns = []

    def wait(file, takes):
        while not takes():
            turns.append(len(turns))
            if len(turns) == 3:
                holder.__exit__(None, None, None)

    holder = locked(tmp_path / "lock", at_most(0.0, now))
    holder.__enter__()
    with locked(tmp_path / "lock", wait):
        assert turns == [0, 1, 2]


@pytest.mark.parametrize("stays", [False, True])
def test_a_child_holds_it_after_the_context_only_if_asked(tmp_path, stays):
    with locked(tmp_path / "lock", at_most(0.0, now), stays_with_children=stays):
        child = os.fork()
        if child == 0:
            signal.pause()
    if stays:
        with pytest.raises(TakenError), locked(tmp_path / "lock", at_most(0.0, now)):
            pass
    else:
        with locked(tmp_path / "lock", at_most(0.0, now)):
            pass
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with locked(tmp_path / "lock", at_most(600.0, now)):
        pass


def test_a_file_that_its_holder_deleted_is_made_again(tmp_path):
    """The next process has the deleted file open, and a third one would lock another."""
    folder = tmp_path / "work"
    turns = []

    def wait(file, takes):
        if not turns:
            turns.append(takes())  # False: it is held
            (folder / "lock").unlink()
            folder.rmdir()
            holder.__exit__(None, None, None)
        turns.append(takes())

    holder = locked(folder / "lock", at_most(0.0, now))
    holder.__enter__()
    with locked(folder / "lock", wait):
        assert turns == [False, True, True]
        with pytest.raises(TakenError), locked(folder / "lock", at_most(0.0, now)):
            pass


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS, 524])
def test_without_locks_the_reason_is_given(tmp_path, monkeypatch, number):
    def refuse(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with locked(tmp_path / "lock", at_most(0.0, now)) as lock:
        assert lock.missing == os.strerror(number)
        with locked(tmp_path / "lock", at_most(0.0, now)):
            pass


def test_another_error_is_raised(tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(OSError, match="Input/output"), locked(tmp_path / "lock", at_most(0.0, now)):
        pass
