"""What is known of a job of this process, on rank 0; published by threads."""

from __future__ import annotations

import logging
import os
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import megapoly
from megapoly.config import Config
from megapoly.errors import MegapolyError
from megapoly.platform import launcher
from megapoly.training.run_status.exports import opened_exports
from megapoly.training.run_status.record import RunStatus, new_status
from megapoly.training.run_status.target import Publisher, StatusFile, Target
from megapoly.training.watchdog import heartbeat

logger = logging.getLogger(__name__)

# By phase; before the first step there are others, such as the loading of the checkpoint.
_STATES = {
    "step": "training",
    "writing of the profile": "training",
    "evaluation": "evaluating",
    "evaluation of tasks": "evaluating",
    "saving": "saving",
    "end of the training": "saving",
}
_LAST_S = 10.0  # longest wait at the end, for a disk or collector that does not respond
_LONGEST_MESSAGE = 2000
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class StatusRecorder:
    """The status of this job. The main thread changes it, and never waits for a disk or network.

    Args:
        status: at the start.
        targets: where it is published.
    """

    def __init__(self, status: RunStatus, targets: Sequence[Target]) -> None:
        self._status, self._lock = status, threading.Lock()
        self._ending = threading.Event()
        self._follow: Callable[[], dict[str, Any]] = dict
        self.show: Callable[[str], None] = logger.warning
        publishers = [
            Publisher(each, self.snapshot, self._ending, lambda line: self.show(line))
            for each in targets
        ]
        for each in publishers:
            each.start()
        self._publishers = publishers

    def change(self, **values: Any) -> None:
        """Set fields of the status."""
        with self._lock:
            for name, value in values.items():
                setattr(self._status, name, value)

    def follow(self, values: Callable[[], dict[str, Any]]) -> None:
        """Take fields from a function whenever the status is published; by several threads."""
        self._follow = values

    def snapshot(self) -> RunStatus:
        """Return a copy of the status as it is now."""
        now = time.time()
        values = self._follow() | {"memory_bytes": _resident_bytes(), "updated": now}
        if not self._ending.is_set():
            values |= _position(now)
        with self._lock:
            return replace(self._status, **values)

    def close(self, state: str, **values: Any) -> None:
        """Publish the end of the job, and stop."""
        self._ending.set()
        self.change(state=state, phase="", expected_by=None, **values)
        deadline = time.monotonic() + _LAST_S
        for each in self._publishers:
            each.join(max(0.0, deadline - time.monotonic()))


def _position(now: float) -> dict[str, Any]:
    """Return what rank 0 does, and until when it must give the next sign of life."""
    watched = heartbeat.current()
    if watched is None:
        return {}
    position = watched.beats.read()
    limit_s = position.limit_s - position.silent_s
    return {
        "state": _STATES.get(position.phase, "starting"),
        "phase": position.phase,
        "expected_by": now + limit_s if watched.has_watcher else None,
    }


def _resident_bytes() -> int | None:
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE_BYTES
    except OSError:
        return None


@contextmanager
def recorded(config: Config) -> Iterator[StatusRecorder]:
    """Record this job in the folder of its run, which rank 0 has locked.

    Args:
        config: resolved.
    """
    checkpoint = config.checkpoint
    status = new_status(
        config.run_dir,
        train_iters=config.training.train_iters,
        world_size=launcher.world_size(),
        layout=_layout(config),
        save_interval=checkpoint.save_interval if checkpoint.save else None,
        megapoly_version=megapoly.__version__,
    )
    targets: list[Target] = [StatusFile(Path(config.run_dir))]
    recorder = StatusRecorder(status, targets + opened_exports(config.logging.export or []))
    try:
        yield recorder
    except BaseException as error:
        is_ours = isinstance(error, MegapolyError)
        text = str(error) if is_ours else "".join(traceback.format_exception_only(error)).strip()
        status_of_end = launcher.exit_status(error)
        recorder.close("failed", exit_status=status_of_end, message=text[:_LONGEST_MESSAGE])
        raise
    last = recorder.snapshot()
    is_complete = last.train_iters is not None and last.step >= last.train_iters
    recorder.close("complete" if is_complete else "stopped")


def _layout(config: Config) -> str:
    """Return the sizes of the parallel groups that have more than one rank."""
    parallel = config.parallel
    sizes = {
        "tensor": parallel.tensor_model_parallel_size,
        "pipeline": parallel.pipeline_model_parallel_size,
        "context": parallel.context_parallel_size,
        "expert": parallel.expert_model_parallel_size,
    }
    sizes["data"] = launcher.world_size() // (
        sizes["tensor"] * sizes["pipeline"] * sizes["context"]
    )
    return ", ".join(f"{name} {size}" for name, size in sizes.items() if size > 1)
