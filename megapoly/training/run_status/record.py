"""The content of ``RUN_DIR/status.json``. Needs the standard library alone."""

from __future__ import annotations

import json
import math
import os
import socket
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from megapoly.platform import launcher
from megapoly.platform.files import replace_text
from megapoly.platform.identity import ProcessIdentity, own_identity

NAME = "status.json"
VERSION = 1
# States of a job, in their usual order. A run that was killed stays in one of the first four.
RUNNING = ("starting", "training", "evaluating", "saving")
ENDED = ("complete", "stopped", "failed")
_PAUSE_S = 0.05


class StatusError(Exception):
    """A ``status.json`` cannot be read, or is none; the text follows its name."""


@dataclass
class SavedCheckpoint:
    """A checkpoint that is complete.

    Args:
        path: its folder.
        step: after which it was saved.
        time: when it was complete, in unix seconds; null if that is not known.
    """

    path: str
    step: int
    time: float | None


@dataclass
class RunStatus:
    """How a run is. Times are unix seconds; null is a value that is not known (yet).

    Args:
        run_dir: folder of the run, as configured.
        train_iters: steps of the whole run.
        version: of this format.
        state: ``starting``, ``training``, ``evaluating``, ``saving``, and at the end ``complete``,
            ``stopped`` (on request) or ``failed``.
        phase: what rank 0 does, in the words of the watch for hangs.
        updated: time of this record.
        expected_by: time by which the next sign of life must come; later the run hangs, and ends
            with status 4. Null if ``parallel.hang_timeout_s`` is 0, and after the end.
        started: time of this start of the job.
        step: steps made.
        last_step: time of the end of the last step.
        step_time_s: seconds of the last step.
        eta_s: seconds to the end of the run at the smoothed time of a step; without evaluations and
            saving.
        loss: training loss of the last step.
        grad_norm: of the last step.
        learning_rate: of the last step.
        tokens_per_second: of the last step, all processes together.
        mfu: model FLOP/s utilization of the last step; null if the peak is not known.
        consumed_tokens: tokens that the run has trained on.
        spikes: steps of the run with a spike, trained on or not.
        skipped_steps: steps of the run that were left out.
        validation: last loss of each validation set.
        tasks: last score of each benchmark task, in percent.
        slowest_rank_ratio: time of the slowest rank over the median of its peers, see hangs.md.
        memory_bytes: memory of rank 0's process on the host.
        gpu_memory_bytes: largest memory of tensors on rank 0's GPU; null on CPU.
        checkpoint: the newest one: ``path``, ``step``, ``time``.
        save_interval: steps between checkpoints; 0: none before the end; null: none at all.
        host: name of rank 0's host.
        pid: of rank 0.
        process: what identifies rank 0 on its machine.
        world_size: processes of the job.
        layout: sizes of the parallel groups.
        job: ids that Slurm or Kubernetes gave the job, if any.
        exit_status: of rank 0, when it has failed.
        message: why it has failed.
        megapoly_version: that wrote the file.
    """

    run_dir: str
    train_iters: int | None = None
    version: int = VERSION
    state: str = "starting"
    phase: str = ""
    updated: float = 0.0
    expected_by: float | None = None
    started: float | None = None
    step: int = 0
    last_step: float | None = None
    step_time_s: float | None = None
    eta_s: float | None = None
    loss: float | None = None
    grad_norm: float | None = None
    learning_rate: float | None = None
    tokens_per_second: float | None = None
    mfu: float | None = None
    consumed_tokens: int | None = None
    spikes: int | None = None
    skipped_steps: int | None = None
    validation: dict[str, float | None] = field(default_factory=dict)
    tasks: dict[str, float | None] = field(default_factory=dict)
    slowest_rank_ratio: float | None = None
    memory_bytes: int | None = None
    gpu_memory_bytes: int | None = None
    checkpoint: SavedCheckpoint | None = None
    save_interval: int | None = None
    host: str | None = None
    pid: int | None = None
    process: ProcessIdentity | None = None
    world_size: int | None = None
    layout: str | None = None
    job: dict[str, str] = field(default_factory=dict)
    exit_status: int | None = None
    message: str | None = None
    megapoly_version: str | None = None

    @property
    def is_running(self) -> bool:
        """Whether the job has not said how it ended."""
        return self.state in RUNNING

    def to_dict(self) -> dict[str, Any]:
        """Return values for JSON, which has no number that is not finite: null."""
        return {name: _plain(value) for name, value in asdict(self).items()}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def status_text(status: RunStatus) -> str:
    """Return the file's text."""
    return json.dumps(status.to_dict(), indent=1) + "\n"


def read_status(run_dir: Path) -> RunStatus | None:
    """Return the status of a run; None if it has no file.

    Raises:
        StatusError: the file cannot be read, or is none.
    """
    try:
        try:
            return _parsed((run_dir / NAME).read_bytes())
        except ValueError:  # on a full disk it is written in place
            time.sleep(_PAUSE_S)
            return _parsed((run_dir / NAME).read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StatusError(f"cannot be read: {error.strerror}") from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise StatusError(f"is damaged ({str(error)[:80]})") from error


def _parsed(data: bytes) -> RunStatus:
    """Return the status of a text; fields of a later version are left out."""
    found = json.loads(data)
    if not isinstance(found, dict):
        raise ValueError("it is no object")
    known = {each.name for each in fields(RunStatus)}
    values = {name: value for name, value in found.items() if name in known}
    for name, kind in (("checkpoint", SavedCheckpoint), ("process", ProcessIdentity)):
        if isinstance(values.get(name), dict):
            values[name] = kind(**values[name])
    status = RunStatus(**values)
    _check(status)
    return status


def _check(status: RunStatus) -> None:
    """Refuse what a reader would compute with and cannot.

    Raises:
        ValueError: the file is not one of megapoly.
    """
    times = (status.updated, status.expected_by, status.last_step, status.started)
    numbers = (status.step, status.train_iters, status.eta_s, status.step_time_s, *times)
    if not all(each is None or isinstance(each, int | float) for each in numbers):
        raise ValueError("a number is none")
    if status.state not in (*RUNNING, *ENDED):
        raise ValueError(f"its state is {str(status.state)[:40]}")
    if not isinstance(status.run_dir, str) or not isinstance(status.validation, dict):
        raise ValueError("a field has another type")


def note_failure(run_dir: Path, pid: int, exit_status: int, message: str) -> None:
    """Say in the file that the job has failed, for a process that cannot do it itself any more.

    Args:
        run_dir: folder of the run.
        pid: of that process; the file of another one is left as it is.
        exit_status: with which it ends.
        message: why.

    Raises:
        OSError: the file cannot be written.
    """
    try:
        status = read_status(run_dir)
    except StatusError:
        return
    if status is not None and status.pid == pid and status.is_running:
        status.state, status.phase, status.expected_by = "failed", "", None
        status.exit_status, status.message = exit_status, message
        status.updated = time.time()
        replace_text(run_dir / NAME, status_text(status))


def job_identity(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return what schedulers call this job: ids of Slurm, the pod of Kubernetes."""
    names = {
        "slurm_job_id": "SLURM_JOB_ID",
        "slurm_job_name": "SLURM_JOB_NAME",
        "slurm_array_task_id": "SLURM_ARRAY_TASK_ID",
        "slurm_restart_count": "SLURM_RESTART_COUNT",
        "pod": "POD_NAME",
        "namespace": "POD_NAMESPACE",
    }
    found = {name: environ[key] for name, key in names.items() if environ.get(key)}
    if (pod := launcher.kubernetes_pod(environ)) is not None:
        found["pod"] = pod
    return found


def new_status(run_dir: str, **values: Any) -> RunStatus:
    """Return the status of a job of this process that starts."""
    now = time.time()
    return RunStatus(
        run_dir,
        host=socket.gethostname(),
        pid=os.getpid(),
        process=own_identity(),
        started=now,
        updated=now,
        job=job_identity(),
        **values,
    )
