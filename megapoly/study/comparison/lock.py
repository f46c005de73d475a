"""A lock by which one comparison at a time runs in a folder."""

from __future__ import annotations

import errno
import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megapoly.errors import ConfigError

_FILE = ".lock"
_NOT_SUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


@contextmanager
def sole_use(folder: Path) -> Iterator[int | None]:
    """Create a folder if it does not exist, and lock it.

    Yields:
        The file descriptor of the lock, or None if the file system has no locks. A process that
        inherits the descriptor also holds the lock, so that a second command does not start while
        jobs that outlive this process run.

    Raises:
        ConfigError: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / _FILE).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                [
                    f"another comparison, or runs of one that was killed, are running in "
                    f"`--output` ({folder}); wait until they end, or stop them (`fuser "
                    f"{folder / _FILE}` shows the processes on this machine)"
                ]
            ) from error
        except OSError as error:
            if error.errno not in _NOT_SUPPORTED:
                raise
            yield None
            return
        yield file.fileno()
