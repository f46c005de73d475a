"""A folder in which one comparison works at a time."""

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
    """Lock a folder, which is made.

    Yields:
        The file descriptor of the lock: a process that inherits it holds the lock, too, so that
        jobs that outlive this process are not met by a second command. None: this disk has no
        locks.

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
                    f"another comparison, or runs of one that was killed, are at work in "
                    f"`--output` ({folder}); wait for their end, or end them (`fuser "
                    f"{folder / _FILE}` shows the processes of this machine)"
                ]
            ) from error
        except OSError as error:
            if error.errno not in _NOT_SUPPORTED:
                raise
            yield None
            return
        yield file.fileno()
