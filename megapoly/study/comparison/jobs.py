"""Run trials, several at a time, each as its own job, and show their progress."""

from __future__ import annotations

import contextlib
import datetime
import os
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from megapoly.errors import MegapolyError
from megapoly.platform.launcher import DIVERGED
from megapoly.study.comparison.outcome import is_complete, last_record, validation_loss

_POLL_S = 0.5
# Number of lines of a failed job's log that are shown.
_TAIL_LINES = 15


class TrialError(MegapolyError):
    """A trial's job failed."""


@dataclass(frozen=True)
class TrialJob:
    """A command that trains one run.

    Args:
        name: of the trial.
        command: program and arguments. On SIGTERM it saves and exits; its exit status is
            :data:`~megapoly.platform.launcher.DIVERGED` if the loss was not finite.
        run_dir: folder in which it writes ``metrics.jsonl``.
        log: file of its output.
        steps: of the run.
        environment: variables in addition to this process's.
    """

    name: str
    command: Sequence[str]
    run_dir: Path
    log: Path
    steps: int
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass
class _RunningJob:
    job: TrialJob
    process: subprocess.Popen[bytes]
    start: float
    task: TaskID | None = None


class JobRunner:
    """Runs jobs and shows one line for each running job.

    Args:
        console: for progress.
        at_once: number of jobs that run at the same time.
        total: jobs of the whole comparison, for the count; may be changed between two calls of
            :meth:`run`.
        on_end: called for every job that has ended, failed or been stopped, with the job, its
            seconds and whether it diverged.
        inherited: file descriptors that jobs keep open.
    """

    def __init__(
        self,
        console: Console,
        *,
        at_once: int,
        total: int,
        on_end: Callable[[TrialJob, float, bool], None],
        inherited: Sequence[int] = (),
    ) -> None:
        self._console, self._at_once, self._on_end = console, at_once, on_end
        self.total = total
        self._inherited = inherited
        self._finished = 0
        self._start = time.monotonic()
        self._num_run = 0
        self._progress: Progress | None = None

    def skip(self, job: TrialJob, *, diverged: bool = False) -> None:
        """Count a job whose run is complete, or has diverged."""
        self._finished += 1
        self._say(f"{job.name}: {_diverged(job) if diverged else f'complete, {_outcome(job)}'}")

    def run(self, jobs: Sequence[TrialJob]) -> None:
        """Run all jobs; on Ctrl-C, SIGTERM or an error the running ones save and exit.

        Raises:
            TrialError: jobs failed; raised after all other jobs have run.
        """
        waiting, running, failed = deque(jobs), list[_RunningJob](), list[TrialJob]()
        with self._live_progress(), self._ended_at_exit(running):
            while waiting or running:
                while waiting and len(running) < self._at_once:
                    self._begin(waiting.popleft(), running)
                time.sleep(_POLL_S)
                for one in list(running):
                    self._update(one)
                    if one.process.poll() is not None:
                        running.remove(one)
                        if not self._end(one):
                            failed.append(one.job)
        if failed:
            raise TrialError(
                f"{len(failed)} of {len(jobs)} trials have failed: "
                + "; ".join(f"{job.name} ({job.log})" for job in failed)
                + ". Run the same command to try them again."
            )

    @contextlib.contextmanager
    def _live_progress(self) -> Iterator[None]:
        if not self._console.is_terminal:
            yield
            return
        columns = ("{task.description}", BarColumn(bar_width=16), MofNCompleteColumn())
        status = TextColumn("{task.fields[status]}")
        with Progress(*columns, status, console=self._console) as self._progress:
            yield
        self._progress = None

    @contextlib.contextmanager
    def _ended_at_exit(self, running: Sequence[_RunningJob]) -> Iterator[None]:
        """If this process ends early, send SIGTERM to the jobs and wait until they have saved."""
        try:
            yield
        finally:
            for one in running:
                if one.process.poll() is None:
                    with contextlib.suppress(ProcessLookupError):
                        # The process group: a shell that waits for the trainer would end alone.
                        os.killpg(one.process.pid, signal.SIGTERM)
            for one in running:
                status = one.process.wait()
                self._on_end(one.job, time.monotonic() - one.start, status == DIVERGED)

    def _begin(self, job: TrialJob, running: list[_RunningJob]) -> None:
        """Start a job and add it to the running ones, which a signal in between would not stop."""
        job.log.parent.mkdir(parents=True, exist_ok=True)
        with job.log.open("ab") as log, _stops_deferred():
            process = subprocess.Popen(
                job.command,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env={**os.environ, **job.environment},
                pass_fds=self._inherited,
                start_new_session=True,  # Ctrl-C reaches only this process, which stops the jobs
            )
            begun = _RunningJob(job, process, time.monotonic())
            running.append(begun)
        if self._progress is None:
            self._say(f"{job.name}: started")
        else:
            begun.task = self._progress.add_task(job.name, total=job.steps, status="starting")

    def _update(self, one: _RunningJob) -> None:
        if self._progress is None or one.task is None:
            return
        record = last_record(one.job.run_dir)
        if record:
            step, left = record["iteration"], one.job.steps - record["iteration"]
            eta = datetime.timedelta(seconds=round(left * record["step_time_s"]))
            status = f"loss {_loss_of(record)} | ETA {eta}"
            self._progress.update(one.task, completed=step, status=status)

    def _end(self, one: _RunningJob) -> bool:
        """Print how a job ended and return whether its run is complete or has diverged."""
        seconds = time.monotonic() - one.start
        if self._progress is not None and one.task is not None:
            self._progress.remove_task(one.task)
        self._finished += 1
        diverged = one.process.returncode == DIVERGED
        self._on_end(one.job, seconds, diverged)
        if not diverged and not is_complete(one.job.run_dir, one.job.steps):
            lines = one.job.log.read_text(errors="replace").splitlines()[-_TAIL_LINES:]
            ended = _describe_status(one.process.returncode)
            self._say("\n".join([f"{one.job.name}: {ended}; {one.job.log}", *lines]))
            return False
        self._num_run += 1
        outcome = _diverged(one.job) if diverged else _outcome(one.job)
        took = datetime.timedelta(seconds=round(seconds))
        self._say(f"{one.job.name}: {outcome}, {took} {self._count()}")
        return True

    def _count(self) -> str:
        left = (self.total - self._finished) / self._num_run * (time.monotonic() - self._start)
        about = datetime.timedelta(seconds=round(left))
        return f"({self._finished} of {self.total}, about {about} left)"

    def _say(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


@contextlib.contextmanager
def _stops_deferred() -> Iterator[None]:
    """Deliver SIGINT and SIGTERM after the block; their handlers raise wherever Python is.

    Handlers, and not the mask of the process, because a job would inherit the mask.
    """
    if threading.current_thread() is not threading.main_thread():  # signals reach that one
        yield
        return
    arrived: list[int] = []
    with contextlib.ExitStack() as stack:
        for number in (signal.SIGINT, signal.SIGTERM):
            previous = signal.getsignal(number)
            # Registered first: a signal that arrives here leaves no handler behind.
            stack.callback(signal.signal, number, previous)
            signal.signal(number, lambda caught, _: arrived.append(caught))
        yield
    for caught in arrived:
        signal.raise_signal(caught)


def _loss_of(record: Mapping[str, Any]) -> str:
    """Return the loss of a step for a line; that of a skipped step may be null."""
    loss = record["lm_loss"]
    return "not finite" if loss is None else f"{loss:.4f}"


def _outcome(job: TrialJob) -> str:
    record = last_record(job.run_dir)
    loss = validation_loss(record)
    shown = [f"loss {_loss_of(record)}"] if record else []
    return ", ".join(shown + ([] if loss is None else [f"validation loss {loss:.4f}"]))


def _diverged(job: TrialJob) -> str:
    steps = last_record(job.run_dir).get("iteration", 0)
    return f"diverged after step {steps} of {job.steps}"


def _describe_status(status: int) -> str:
    """Describe the exit status of a job that is not complete."""
    if status < 0:
        return f"killed by {signal.Signals(-status).name}"
    return f"failed, status {status}" if status else "ended before its last step"
