"""A lock by which one comparison at a time runs in a folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from megapoly.errors import ConfigError
from megapoly.platform.locks import at_most, locked

_FILE = ".lock"


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
    path = folder / _FILE

    def refusal(file: IO[str]) -> ConfigError:
        return ConfigError(
            [
                "another comparison, or runs of one that was killed, are running in `--output` "
                f"({folder}); wait until they end, or stop them (`fuser {path}` shows the "
                "processes on this machine)"
            ]
        )

    with locked(path, at_most(0.0, refusal), stays_with_children=True) as lock:
        yield None if lock.missing else lock.file.fileno()
