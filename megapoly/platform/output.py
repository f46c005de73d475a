"""Output of a job that trains on without it.

A log file on a full disk, or a reader that has ended, such as ``tee`` at Ctrl-C, would otherwise
end a job of days at its next line, and without a checkpoint.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
from typing import Any, TextIO


class _LastingFile(io.FileIO):
    """A file whose bytes are left out when the system does not take them."""

    _num_missing, _reason = 0, ""

    def write(self, data: Any) -> int:
        """Return the number of bytes that need not be written again: all of them after an error."""
        try:
            if self._num_missing:
                note = f"\n({self._num_missing} bytes are missing here: {self._reason})\n"
                os.write(self.fileno(), note.encode())
                self._num_missing = 0
            written: int | None = super().write(data)
            return written or 0
        except OSError as error:
            self._num_missing += len(data)
            self._reason = error.strerror or ""
            return len(data)


def train_on_without_output() -> None:
    """Let lines that standard output and standard error do not take be left out.

    When they take lines again, as a disk that has room, one says how many bytes are missing. An
    output that is no file of this process, as in a test, is left as it is.
    """
    for name, original in (("stdout", sys.__stdout__), ("stderr", sys.__stderr__)):
        stream = getattr(sys, name)
        if original is None or stream is not original:
            continue
        with contextlib.suppress(OSError):
            stream.flush()
        lasting = _lasting(stream)
        setattr(sys, name, lasting)
        for handler in logging.getLogger().handlers:
            if isinstance(handler, logging.StreamHandler) and handler.stream is stream:
                handler.setStream(lasting)


def _lasting(stream: TextIO) -> TextIO:
    file = io.BufferedWriter(_LastingFile(stream.fileno(), "w", closefd=False))
    is_by_line = bool(getattr(stream, "line_buffering", False))
    is_direct = bool(getattr(stream, "write_through", False))  # PYTHONUNBUFFERED
    return io.TextIOWrapper(
        file,
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=is_by_line or is_direct,
    )
