"""The memory that a rank and its watcher share: what the rank does, and since when."""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass

# 8-byte numbers (beats, step, whether files are used, limit, whether it waits, silence), then two
# texts (phase, job).
_NUMBERS, _TEXT = 48, 64
_SIZE = _NUMBERS + 2 * _TEXT
_BEATS, _STEP, _FILES, _LIMIT, _WAITS, _SILENT = range(6)


@dataclass(frozen=True)
class Position:
    """Where a rank is.

    Args:
        beats: how often it has said that it advances.
        step: that it trains; 0 before the first.
        limit_s: seconds that it may be silent.
        phase: what it does.
        uses_files: bytes that it reads or writes count as an advance.
        waits: for other ranks, in a collective.
        job: name of the job's start, the same on all ranks; "" before they have met.
        silent_s: seconds for which it has been silent, as its watcher counts them.
    """

    beats: int
    step: int
    limit_s: float
    phase: str
    uses_files: bool
    waits: bool
    job: str
    silent_s: float


class Beats:
    """A view of the memory; the rank writes and the watcher reads, but for the silence.

    Args:
        file: descriptor of an anonymous file, see :func:`new_file`.
    """

    def __init__(self, file: int) -> None:
        self._memory = mmap.mmap(file, _SIZE)
        self._bytes = memoryview(self._memory)
        self._integers = self._bytes[:_NUMBERS].cast("q")
        self._floats = self._bytes[:_NUMBERS].cast("d")

    def beat(self) -> None:
        """Count an advance. 0.1 microseconds."""
        self._integers[_BEATS] += 1

    def enter(self, phase: str, limit_s: float, *, uses_files: bool) -> None:
        """Set what the rank does from here on; see :class:`Position`."""
        self._write(0, phase)
        self._integers[_FILES] = uses_files
        self._floats[_LIMIT] = limit_s
        self.beat()

    def begin_step(self, step: int) -> None:
        """Set the number of the step."""
        self._integers[_STEP] = step
        self.beat()

    def wait(self, waits: bool) -> None:
        """Set whether the rank waits for others."""
        self._integers[_WAITS] = waits

    def name_job(self, job: str) -> None:
        """Set the name of the job's start."""
        self._write(1, job)

    def note_silence(self, seconds: float) -> None:
        """Set how long the rank has been silent; by the watcher."""
        self._floats[_SILENT] = seconds

    def read(self) -> Position:
        """Return where the rank is."""
        return Position(
            self._integers[_BEATS],
            self._integers[_STEP],
            self._floats[_LIMIT],
            self._read(0),
            bool(self._integers[_FILES]),
            bool(self._integers[_WAITS]),
            self._read(1),
            self._floats[_SILENT],
        )

    def close(self) -> None:
        """Release the memory."""
        for view in (self._integers, self._floats, self._bytes):
            view.release()
        self._memory.close()

    def _write(self, slot: int, text: str) -> None:
        start = _NUMBERS + slot * _TEXT
        self._bytes[start : start + _TEXT] = text.encode()[: _TEXT - 1].ljust(_TEXT, b"\0")

    def _read(self, slot: int) -> str:
        start = _NUMBERS + slot * _TEXT
        return bytes(self._bytes[start : start + _TEXT]).rstrip(b"\0").decode(errors="replace")


def new_file() -> int:
    """Return the descriptor of a new anonymous file for :class:`Beats`."""
    file = os.memfd_create("megapoly-beats")
    os.truncate(file, _SIZE)
    return file
