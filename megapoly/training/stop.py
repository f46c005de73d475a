"""Requests to stop a run: Ctrl-C, SIGTERM, a closed terminal."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any

from megapoly.platform.processes import (
    STOP_SIGNALS,
    ignore_stop_signals,
    outlives_its_terminal,
)


class StopRequest:
    """Context in which SIGINT, SIGTERM and SIGHUP set a flag instead of ending the process.

    A second signal has no effect: torchrun forwards the signals that it receives to its workers,
    and a terminal sends Ctrl-C to all of them, so that one request may arrive twice. A process that
    ignores SIGHUP, as under ``nohup``, goes on doing so.

    Args:
        ends_process: whether the process ends after the context. The signals then have no effect
            any more, so that its exit status is the run's; otherwise they do what they did before.
    """

    def __init__(self, *, ends_process: bool = False) -> None:
        self.requested = False
        self._ends_process = ends_process
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in STOP_SIGNALS:
            if number != signal.SIGHUP or not outlives_its_terminal():
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._ends_process:
            ignore_stop_signals()
            return
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
