"""Whether a run is well, judged by its ``status.json``. Needs the standard library alone."""

from __future__ import annotations

from dataclasses import dataclass

from megapoly.platform.identity import is_gone
from megapoly.training.run_status.record import RunStatus

# By which the clocks of two hosts may differ.
CLOCK_SKEW_S = 60.0
# What a reader says instead of a state in which the job no longer is.
SILENT, DEAD = "silent", "dead"


@dataclass(frozen=True)
class Health:
    """A judgement on a run.

    Args:
        is_well: it advances in time, is complete, or was stopped on request.
        state: of :class:`RunStatus`; ``silent`` if no sign of life came in time, ``dead`` if its
            process has ended without a word.
        sentence: why, without the run's name.
    """

    is_well: bool
    state: str
    sentence: str


def health_of(status: RunStatus, now: float) -> Health:
    """Judge a run.

    Args:
        status: as it was read.
        now: unix seconds of the reader's clock, which may differ from the writer's by
            :data:`CLOCK_SKEW_S`.
    """
    if not status.is_running:
        return _of_ended(status)
    where = f"process {status.pid} on {status.host}"
    doing = "starting" if not status.phase else _doing(status)
    if status.process is not None and is_gone(status.process):
        # Until it trains, a request to stop ends it like any other program.
        how = "stopped or killed" if status.state == "starting" else "killed"
        return Health(
            False,
            DEAD,
            f"ended without a word while {doing}: {where} was {how}, as for memory, or failed too "
            "hard to say so; start the same command again, it resumes",
        )
    late_s = 0.0 if status.expected_by is None else now - status.expected_by
    if late_s > CLOCK_SKEW_S:
        silent_s = now - max(status.last_step or 0.0, status.started or 0.0)
        return Health(
            False,
            SILENT,
            f"no sign of life for {duration(silent_s)}, {duration(late_s)} longer than it may be "
            f"silent: {where} was {doing}; see whether it and its host are up",
        )
    return Health(True, status.state, _sentence(status, doing, now))


def health_of_files(status: RunStatus) -> Health:
    """Judge a run that has no ``status.json``, by :func:`.folders.status_of_files`."""
    total = "" if status.train_iters is None else f" of {status.train_iters}"
    where = f"after step {status.step}{total}"
    if status.state == "complete":
        return Health(True, "complete", f"complete {where}")
    if status.state == "training":
        return Health(
            True,
            "training",
            f"a job holds its lock, {where}; it has no status.json, so that a hang does not show",
        )
    return Health(
        False, "unknown", f"no job of this host trains it, {where}; it has no status.json"
    )


def _doing(status: RunStatus) -> str:
    total = "" if status.train_iters is None else f" of {status.train_iters}"
    if status.state == "starting":
        return f"starting ({status.phase})"
    return f"{status.state} after step {status.step}{total}"


def _sentence(status: RunStatus, doing: str, now: float) -> str:
    if status.last_step is None:
        age = f", for {duration(now - status.started)}" if status.started else ""
        return f"{doing}{age}"
    unlimited = "" if status.expected_by else "; how long it may be silent is not limited"
    return f"{doing}, {duration(now - status.last_step)} ago{unlimited}"


def _of_ended(status: RunStatus) -> Health:
    total = "" if status.train_iters is None else f" of {status.train_iters}"
    if status.state == "complete":
        return Health(True, "complete", f"complete after step {status.step}")
    if status.state == "stopped":
        return Health(True, "stopped", f"stopped on request after step {status.step}{total}")
    ending = "" if status.exit_status is None else f" with status {status.exit_status}"
    why = "" if not status.message else f": {' '.join(status.message.split())}"
    return Health(False, "failed", f"failed{ending} after step {status.step}{total}{why}")


def duration(seconds: float) -> str:
    """Return a time in two units at most: ``42 s``, ``3 min``, ``2 h 5 min``, ``3 d 4 h``."""
    whole = max(0, round(seconds))
    if whole < 120:
        return f"{whole} s"
    minutes, hours, days = whole // 60, whole // 3600, whole // 86_400
    if minutes < 120:
        return f"{minutes} min"
    if hours < 48:
        return f"{hours} h {minutes % 60} min"
    return f"{days} d {hours % 24} h"
