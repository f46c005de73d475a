"""One job at a time in a run's folder, by the lock ``RUN_DIR/.lock``."""

from __future__ import annotations

import datetime
import errno
import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from megapoly.errors import LockError

logger = logging.getLogger(__name__)

_FILE = ".lock"
# A job that was killed holds the lock until the system has freed its memory.
_PATIENCE_S, _PAUSE_S = 5.0, 0.1
_TAKEN = {errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES}
_NOT_SUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


@contextmanager
def sole_job(run_dir: Path) -> Iterator[None]:
    """Hold the lock of a run's folder, which exists.

    The file names the job: its host, process and start. The system releases the lock when the
    process and those that it has forked have ended, however they end; the file stays. On a file
    system that has no locks, a warning is logged and the folder is used without.

    Raises:
        LockError: another job holds the lock, on any host that shares the file system.
    """
    with (run_dir / _FILE).open("a+") as file:
        if _take(file, run_dir):
            _sign(file)
        try:
            yield
        finally:
            # Explicitly: a process that was forked has the file open, too.
            with suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_UN)


def _take(file: IO[str], run_dir: Path) -> bool:
    """Take the lock; return False where there are none."""
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError as error:
            if error.errno in _NOT_SUPPORTED:
                logger.warning(
                    "the file system of %s has no locks (%s): a second job in this folder would "
                    "not be noticed, so start none before this one has ended",
                    run_dir,
                    error.strerror,
                )
                return False
            if error.errno not in _TAKEN:
                raise
        if time.monotonic() > deadline:
            raise LockError(_refusal(file, run_dir))
        time.sleep(_PAUSE_S)


def _refusal(file: IO[str], run_dir: Path) -> str:
    holder, remedy = "another job", "wait until it ends, or stop it"
    with suppress(OSError, ValueError, KeyError, TypeError):
        file.seek(0)
        found = json.load(file)
        host, pid = str(found["host"]), int(found["pid"])
        age = datetime.timedelta(seconds=max(0, round(time.time() - float(found["started"]))))
        holder = f"a job on {host}, process {pid}, started {age} ago"
        remedy += f" (`kill {pid}` on {host}: it saves first)"
    return (
        f"One job at a time trains in a `run_dir`: {holder}, uses {run_dir} and holds its lock; "
        f"{remedy}, or choose another `run_dir`."
    )


def _sign(file: IO[str]) -> None:
    """Write who holds the lock; on a full disk nobody is named."""
    holder = {"host": socket.gethostname(), "pid": os.getpid(), "started": time.time()}
    with suppress(OSError):
        file.truncate(0)
        file.write(json.dumps(holder) + "\n")
        file.flush()
