"""Files of one JSON object a line, such as ``metrics.jsonl``: a damaged line costs that line."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from megapoly.platform.files import free_space

# Bytes at the end of a file that are certain to contain its last line.
_TAIL = 1 << 14


class Line(NamedTuple):
    """A line of a file.

    Args:
        number: from 1.
        start: offset of its first byte.
        record: the object; None if the line is damaged.
        is_whole: whether it ends with a line feed. The last line may not, while it is being written
            or after its writer was killed.
    """

    number: int
    start: int
    record: dict[str, Any] | None
    is_whole: bool


def lines(path: Path) -> Iterator[Line]:
    """Yield the lines of a file, one at a time.

    Raises:
        OSError: the file cannot be read.
    """
    start = 0
    with path.open("rb") as stream:
        for number, text in enumerate(stream, start=1):
            yield Line(number, start, _record(text), text.endswith(b"\n"))
            start += len(text)


def _record(text: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(text)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def last_record(path: Path) -> dict[str, Any]:
    """Return the last object of a file, whose line is whole or not; empty if there is none.

    Only the end of the file is read.

    Raises:
        OSError: the file exists and cannot be read.
    """
    try:
        with path.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - _TAIL))
            found = file.read().split(b"\n")
    except FileNotFoundError:
        return {}
    records = (_record(line) for line in reversed(found))
    return next((record for record in records if record is not None), {})


class LineWriter:
    """Appends lines to a file; those that the disk does not take are kept and written later.

    A full disk, a quota or a file server that does not answer therefore costs no line and stops
    nobody. The file is opened again after a failure: a file system may have been mounted again.

    Args:
        path: of the file, which is made if it does not exist.
        warn: shows a line to the user.
    """

    def __init__(self, path: Path, warn: Callable[[str], None]) -> None:
        self._path, self._warn = path, warn
        self._descriptor: int | None = None
        self._pending = bytearray()
        self._is_failing = False
        self._try_to_write()

    def write(self, record: Mapping[str, Any]) -> None:
        """Append a line, and those before it that are still kept."""
        self._pending += json.dumps(record).encode() + b"\n"
        self._try_to_write()

    def flush_to_disk(self) -> None:
        """Let a power failure not lose what was written."""
        try:
            if self._descriptor is not None:
                os.fsync(self._descriptor)
        except OSError as error:
            if error.errno != errno.EINVAL:  # what has no disk, such as /dev/null
                self._fail(error)

    def close(self) -> None:
        """Write what is still kept, or say that it is lost."""
        self._try_to_write()
        if self._pending:
            count = self._pending.count(b"\n")
            self._warn(f"warning: {count} lines of {self._path} are lost: {free_space(self._path)}")
        self.flush_to_disk()
        self._close()

    def _try_to_write(self) -> None:
        try:
            if self._descriptor is None:
                flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
                self._descriptor = os.open(self._path, flags, 0o666)
            while self._pending:
                # A disk may take a part of a line: the rest follows where it ended.
                written = os.write(self._descriptor, self._pending)
                del self._pending[:written]
        except OSError as error:
            self._fail(error)
            return
        if self._is_failing:
            self._is_failing = False
            self._warn(f"{self._path} is written again, and is complete")

    def _fail(self, error: OSError) -> None:
        self._close()
        if not self._is_failing:
            self._is_failing = True
            self._warn(
                f"warning: {self._path} cannot be written: {error.strerror}; "
                f"{free_space(self._path)}. Training goes on, the lines are kept in memory and "
                "written as soon as the disk takes them"
            )

    def _close(self) -> None:
        if self._descriptor is not None:
            try:
                os.close(self._descriptor)
            except OSError as error:
                self._warn(f"warning: {self._path}: {error.strerror}")
            self._descriptor = None


def drop_lines_after(path: Path, is_after: Callable[[dict[str, Any]], bool]) -> list[int]:
    """Cut a file before the first line for which ``is_after`` holds; it takes no room.

    A last line that is not whole is deleted or completed. Damaged lines before stay: readers leave
    them out.

    Returns:
        The numbers of the damaged lines that stay.

    Raises:
        OSError: the file cannot be read or written.
    """
    damaged = []
    for line in lines(path):
        if line.record is None and line.is_whole:
            damaged.append(line.number)
        elif line.record is None or is_after(line.record):
            os.truncate(path, line.start)
            break
        elif not line.is_whole:
            with path.open("ab") as stream:
                stream.write(b"\n")
            break  # it is the last one
    return damaged
