"""Locks of files between processes (``flock``): the system releases one when its holder ends."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

_TAKEN = {errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES}
# NFS without a lock server, Lustre without `flock`, some of FUSE's, Windows. The last one is the
# kernel's own ENOTSUPP, which it is not meant to return and does under autofs (llnl/scr#510).
_NOT_SUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, 524}
_PAUSE_S = 0.1

# Called with the open file and a function that tries to take the lock and returns whether it is no
# longer to be waited for. Returns when that returned True, or raises.
Wait = Callable[[IO[str], Callable[[], bool]], None]


@dataclass(frozen=True)
class Lock:
    """The open file of a lock.

    Args:
        file: may be read and written; what it held is kept.
        missing: why the file system has no locks, in the system's words; empty: the lock is held.
    """

    file: IO[str]
    missing: str = ""


@contextmanager
def locked(path: Path, wait: Wait, *, stays_with_children: bool = False) -> Iterator[Lock]:
    """Hold the lock of a file, which is made with its folder if it does not exist, and stays.

    On a file system without locks the context is entered all the same: the caller decides.

    Args:
        path: of the file.
        wait: waits for another process that holds the lock; see :func:`at_most`.
        stays_with_children: processes that inherit the file's descriptor hold the lock, too, until
            they end; otherwise it is free at the end of the context.

    Raises:
        OSError: the file cannot be made or locked.
    """
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+") as file:
            missing: list[str] = []
            wait(file, lambda file=file, missing=missing: _take(file, missing))  # type: ignore[misc]
            if not missing and not _is_there(file, path):
                continue  # the holder before has deleted the file
            try:
                yield Lock(file, *missing)
            finally:
                if not stays_with_children and not missing:
                    _release(file)
            return


def at_most(limit_s: float, refusal: Callable[[IO[str]], Exception]) -> Wait:
    """Return what waits for a lock for a limited time.

    Args:
        limit_s: longest wait.
        refusal: returns the error for a lock that is still held by then; it may read the file.
    """

    def wait(file: IO[str], takes: Callable[[], bool]) -> None:
        deadline = time.monotonic() + limit_s
        while not takes():
            if time.monotonic() > deadline:
                raise refusal(file)
            time.sleep(_PAUSE_S)

    return wait


def is_locked(path: Path) -> bool | None:
    """Return whether another process holds the lock of a file; None if that cannot be told.

    The lock is held for a moment, together with others that ask.
    """
    try:
        import fcntl

        with path.open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False
    except ImportError:
        return None
    except OSError as error:
        return True if error.errno in _TAKEN - {errno.EACCES} else None


def _take(file: IO[str], missing: list[str]) -> bool:
    """Take the lock, or note why there are none; return False if another process holds it."""
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        missing.append(os.strerror(errno.ENOSYS))
    except OSError as error:
        if error.errno in _TAKEN:
            return False
        if error.errno not in _NOT_SUPPORTED:
            raise
        missing.append(os.strerror(error.errno))
    return True


def _release(file: IO[str]) -> None:
    """Release explicitly: a process that was forked meanwhile has the file open, too."""
    import fcntl

    with suppress(OSError):
        fcntl.flock(file, fcntl.LOCK_UN)


def _is_there(file: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
