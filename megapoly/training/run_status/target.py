"""Where the status of a run is published, each place by a thread of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from megapoly.platform.files import free_space, replace_text
from megapoly.training.run_status.record import NAME, RunStatus, status_text

# A later `expected_by` alone is written only if it is this much later: a step may beat often.
_NEWS_S = 5.0


class Target(Protocol):
    """A file or collector. One thread calls its methods."""

    name: str
    period_s: float

    def publish(self, status: RunStatus) -> None:
        """Publish a status.

        Raises:
            OSError: it could not be; the next one is tried again.
        """

    def close(self, status: RunStatus) -> None:
        """Publish the last status; as :meth:`publish`."""

    @property
    def missing(self) -> str:
        """What the target has not got, as a part of a sentence; "" if nothing."""


class StatusFile:
    """``RUN_DIR/status.json``, written at most once a second, and when it changes.

    Args:
        run_dir: folder of the run.
    """

    period_s, missing = 1.0, ""

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / NAME
        self.name = str(self._path)
        self._written: RunStatus | None = None

    def publish(self, status: RunStatus) -> None:
        """Write the file, if the status says something else than the file does."""
        if self._written is None or _is_news(self._written, status):
            self.close(status)

    def close(self, status: RunStatus) -> None:
        """Write the file."""
        try:
            replace_text(self._path, status_text(status))
        except OSError as error:
            raise OSError(error.errno, f"{error.strerror}; {free_space(self._path)}") from error
        self._written = status


def _is_news(old: RunStatus, new: RunStatus) -> bool:
    if (old.expected_by is None) != (new.expected_by is None):
        return True
    if abs((new.expected_by or 0.0) - (old.expected_by or 0.0)) >= _NEWS_S:
        return True
    # These change all the time, in a rank that hangs, too.
    same: dict[str, Any] = {"updated": 0.0, "memory_bytes": 0, "expected_by": None}
    return replace(old, **same) != replace(new, **same)


class Publisher(threading.Thread):
    """Publishes a status at one target, periodically and at the end.

    Args:
        target: the place.
        snapshot: returns the status as it is now.
        ending: set when the job ends.
        show: shows a line to the user.
    """

    def __init__(
        self,
        target: Target,
        snapshot: Callable[[], RunStatus],
        ending: threading.Event,
        show: Callable[[str], None],
    ) -> None:
        super().__init__(name=f"status for {target.name}", daemon=True)
        self._target, self._snapshot, self._ending, self._show = target, snapshot, ending, show
        self._is_failing = False

    def run(self) -> None:
        """Publish until the job ends."""
        while not self._ending.is_set():
            self._try(self._target.publish)
            self._ending.wait(self._target.period_s)
        self._try(self._target.close)
        if self._is_failing and self._target.missing:
            self._show(f"warning: {self._target.name}: {self._target.missing}")

    def _try(self, publish: Callable[[RunStatus], None]) -> None:
        """Publish; say the first of a row of failures, and when it works again."""
        try:
            publish(self._snapshot())
        except OSError as error:
            if not self._is_failing:
                self._is_failing = True
                self._show(
                    f"warning: {self._target.name} cannot be written: {error.strerror}. Training "
                    "goes on; it is tried again"
                )
            return
        if self._is_failing:
            self._is_failing = False
            missing = self._target.missing and f"; {self._target.missing}"
            self._show(f"{self._target.name} is written again{missing}")
