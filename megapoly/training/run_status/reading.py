"""Read the status of runs, as ``megapoly status`` shows and prints it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megapoly.training.run_status.folders import status_of_files
from megapoly.training.run_status.health import Health, health_of, health_of_files
from megapoly.training.run_status.record import RunStatus, StatusError, read_status


@dataclass(frozen=True)
class Watched:
    """A run as a reader sees it.

    Args:
        folder: that was read.
        status: its content, or what the run's other files tell.
        health: a judgement on it.
        now: unix seconds, when it was read.
    """

    folder: Path
    status: RunStatus
    health: Health
    now: float

    @property
    def age_s(self) -> float | None:
        """Seconds since the last step; None before the first."""
        last = self.status.last_step
        return None if last is None else max(0.0, self.now - last)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields of ``status.json``, with ``folder``, ``age_s`` and ``health``."""
        return {
            "folder": str(self.folder),
            "age_s": self.age_s,
            "health": asdict(self.health),
            **self.status.to_dict(),
        }


def read_run(folder: Path, now: float) -> Watched:
    """Return what a run's folder tells at a time; a damaged file is a judgement, no error."""
    try:
        status = read_status(folder)
    except StatusError as error:
        judgement = Health(False, "unknown", f"its status.json {error}")
        return Watched(folder, RunStatus(str(folder), state="unknown"), judgement, now)
    if status is None:
        status = status_of_files(folder)
        return Watched(folder, status, health_of_files(status), now)
    return Watched(folder, status, health_of(status, now), now)
