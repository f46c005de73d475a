"""The kinds of faults: each strikes a running job and says what must hold afterwards."""

from __future__ import annotations

import contextlib
import random
import resource
import signal
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megapoly.checkpoints.run_folder import step_of
from megapoly.platform import launcher
from megapoly.testing.soak.run import Run
from megapoly.testing.soak.started_jobs import Job, Jobs, NanStep, children, kill, wait_until

# A launcher is started with interpreters of its own, as `megapoly train` does, in one of so many.
_REAL_LAUNCHERS = 8
# In the log of a job that has failed to save.
_NOT_SAVED = "was not saved: "


class LostError(Exception):
    """Something that must survive a fault did not; the text says what."""


class EndedError(Exception):
    """The job ended before the fault struck, as it does at its last step."""

    def __init__(self, status: int) -> None:
        super().__init__(f"the job ended with status {status} before the fault")
        self.status = status


@dataclass
class Scene:
    """A fault's surroundings.

    Args:
        jobs: starts the job.
        argv: arguments of ``megapoly train``, for this run.
        run: the run under test.
        random: draws moments and victims.
        log: file for what the jobs print.
        timeout_s: longest wait for whatever must happen.
        saved_step: newest step that must still be saved after the fault; raised as steps are seen.
    """

    jobs: Jobs
    argv: Sequence[str]
    run: Run
    random: random.Random
    log: Path
    timeout_s: float
    saved_step: int = 0

    def start(self, *, nan_steps: Iterable[NanStep] = (), new_processes: bool = False) -> Job:
        """Start the job; the steps that met NaN in the uninterrupted run meet it as well."""
        every = [*self.run.reference.nan_steps, *nan_steps]
        return self.jobs.start(
            self.argv, log=self.log, nan_steps=every, new_processes=new_processes
        )

    def wait_for(self, condition: Callable[[], object], job: Job, *, pause_s: float = 0.01) -> None:
        """Wait until a condition holds.

        Raises:
            EndedError: the job ended before.
            LostError: neither happens in time.
        """
        done = wait_until(
            lambda: condition() or job.status() is not None, self.timeout_s, pause_s=pause_s
        )
        if not done:
            raise LostError(f"nothing happened for {self.timeout_s:g} s")
        if not condition():
            raise EndedError(job.status() or 0)

    def wait_for_save(self, job: Job) -> None:
        """Wait until the job has saved a step that the run did not have when this was called."""
        before = self.run.saved_step()
        self.wait_for(lambda: self.run.saved_step() > before, job)

    def wait_for_moment(self, job: Job) -> None:
        """Wait for a moment between two saves, or one time in four before the first."""
        self.wait_for(lambda: len(job.ranks()) == self.num_ranks, job)
        if self.random.random() < 0.25:
            self.let_pass(self.run.reference.seconds_of_start, job)
        else:
            self.wait_between_saves(job)

    def wait_between_saves(self, job: Job) -> None:
        """Wait for a save, and for a part of the time that the next one takes to come."""
        self.wait_for_save(job)
        begin = time.monotonic()
        self.wait_for_save(job)
        self.let_pass(time.monotonic() - begin, job)  # not of another job: load changes

    def let_pass(self, most_s: float, job: Job) -> None:
        """Wait for a random part of a time.

        Raises:
            EndedError: the job ended before.
        """
        if wait_until(lambda: job.status() is not None, most_s * self.random.random()):
            raise EndedError(job.status() or 0)

    @property
    def num_ranks(self) -> int:
        """Number of processes of a job."""
        return self.jobs.num_processes

    def end_of(self, job: Job) -> int:
        """Wait for the job's end and return its status.

        Raises:
            LostError: it does not end in time.
        """
        status = job.wait(self.timeout_s)
        if status is None:
            raise LostError(f"the job did not end within {self.timeout_s:g} s")
        return status

    def failure_of(self, job: Job) -> int:
        """Wait for the job's end and return its status, which is not 0.

        Raises:
            EndedError: the run was complete before the fault had an effect.
            LostError: the job does not end in time, or ends with status 0.
        """
        status = self.end_of(job)
        if status == 0 and self.run.saved_step() == self.run.last_step:
            raise EndedError(status)
        if status == 0:
            raise LostError("the job ended with status 0")
        return status

    def kill_all(self, job: Job) -> None:
        """Kill launcher and ranks, as a host that runs out of memory or power does."""
        self.send([job.pid, *job.ranks()], signal.SIGKILL)
        self.end_of(job)

    def send(self, pids: Iterable[int], number: int) -> None:
        """Send a signal; what is saved by then must stay."""
        self.saved_step = self.run.saved_step()
        kill(pids, number)

    def a_rank(self, job: Job) -> int:
        """Return the process id of one rank."""
        return self.random.choice(job.ranks())


@dataclass(frozen=True)
class Kind:
    """A kind of fault.

    Args:
        summary: what it is, for the table.
        strike: makes it happen and waits for the end of the job; raises :class:`LostError`.
        number: how often it strikes, for each time that the rarest does.
        least_processes: of a job that can meet it.
    """

    summary: str
    strike: Callable[[Scene], None]
    number: int = 2
    least_processes: int = 1


def _kill_all(scene: Scene) -> None:
    job = scene.start()
    scene.wait_for_moment(job)
    scene.kill_all(job)


def _kill_in_a_save(scene: Scene) -> None:
    before = scene.run.partial_checkpoints()  # of a job that was killed
    job = scene.start()
    scene.wait_for(lambda: scene.run.partial_checkpoints() - before, job, pause_s=0.001)
    scene.let_pass(scene.run.reference.seconds_of_a_save, job)
    scene.kill_all(job)


def _kill_rank(scene: Scene) -> None:
    job = scene.start()
    scene.wait_for_moment(job)
    scene.send([scene.a_rank(job)], signal.SIGKILL)
    scene.failure_of(job)


def _kill_launcher(scene: Scene) -> None:
    job = scene.start(new_processes=scene.random.randrange(_REAL_LAUNCHERS) == 0)
    scene.wait_for_moment(job)
    scene.send([job.pid], signal.SIGKILL)
    scene.end_of(job)


def _terminate(scene: Scene) -> None:
    job = scene.start()
    scene.wait_for_save(job)
    scene.send([job.pid], signal.SIGTERM)
    status = scene.end_of(job)
    if status != 0:
        raise LostError(f"a job that was asked to stop ended with status {status}")
    if scene.run.saved_step() != scene.run.recorded_step():
        raise LostError(
            f"a job that was asked to stop has recorded step {scene.run.recorded_step()} and "
            f"saved step {scene.run.saved_step()}"
        )


def _stop_rank(scene: Scene) -> None:
    job = scene.start()
    scene.wait_for_save(job)
    scene.send([scene.a_rank(job)], signal.SIGSTOP)
    status = scene.failure_of(job)
    if status != launcher.HUNG:
        raise LostError(f"a rank was stopped, and the job ended with status {status}")


def _flip(scene: Scene) -> None:
    def flip(file: Path) -> str:
        content = bytearray(file.read_bytes())
        bit = scene.random.randrange(8 * len(content))
        content[bit // 8] ^= 1 << (bit % 8)
        file.write_bytes(content)
        return f"bit {bit} of {file.name}"

    _damage(scene, flip)


def _truncate(scene: Scene) -> None:
    def truncate(file: Path) -> str:
        content = file.read_bytes()
        length = scene.random.randrange(len(content))
        file.write_bytes(content[:length])
        return f"{file.name} from byte {length} on"

    _damage(scene, truncate)


def _damage(scene: Scene, damage: Callable[[Path], str]) -> None:
    """Kill the job, damage the newest checkpoint, and see that the next start takes another."""
    job = scene.start()
    run = scene.run
    scene.wait_for(lambda: len(run.checkpoints()) > 1, job)
    scene.wait_for_save(job)
    scene.kill_all(job)
    *_, before, newest = run.checkpoints()
    scene.saved_step = step_of(before)
    files = sorted(path for path in newest.rglob("*") if path.is_file() and path.stat().st_size)
    what = damage(scene.random.choice(files))
    job = scene.start()
    loaded = f"loaded {before}"
    try:
        scene.wait_for(lambda: f"loaded {run.folder}" in job.text(), job)
    except EndedError as error:
        raise LostError(f"{what} of {newest.name} was damaged, and {error}") from error
    if loaded not in job.text():
        raise LostError(f"{what} of {newest.name} was damaged, and {before.name} was not loaded")
    with contextlib.suppress(EndedError):
        scene.wait_for(lambda: run.saved_step() > step_of(before), job)
    scene.kill_all(job)


def _fill_disk(scene: Scene) -> None:
    """Let no file grow beyond half of the largest of a checkpoint, as on a disk without room.

    When a save has failed, either the job is killed, or there is room again and it must save.
    """
    job, run = scene.start(), scene.run
    scene.wait_for_save(job)
    _limit_files(job, run.largest_file() // 2)
    try:
        scene.wait_for(lambda: _NOT_SAVED in job.text(), job)
    except EndedError as error:
        if error.status:
            raise LostError(f"{error}, and its log has no `{_NOT_SAVED}`") from error
        raise  # it had saved its last step before
    _expect_sentence(job)
    if scene.random.random() < 0.5:
        _limit_files(job, resource.RLIM_INFINITY)
        scene.wait_for_save(job)
    scene.kill_all(job)


def _limit_files(job: Job, limit: int) -> None:
    ranks = job.ranks()
    for pid in [*ranks, *children(ranks)]:
        with contextlib.suppress(ProcessLookupError):
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))


def _meet_nan(scene: Scene) -> None:
    """Let a step meet NaN that does not when the job is started again.

    Where such steps are left out, the uninterrupted run has met NaN as well, and the job is killed
    in the steps after it.
    """
    run = scene.run
    if steps := [step for step, _ in run.reference.nan_steps]:
        job, saved = scene.start(), run.saved_step()
        ahead = next((step for step in steps if step > saved), run.last_step + 1)
        scene.wait_for(lambda: run.recorded_step() >= ahead, job)
        scene.wait_between_saves(job)
        scene.kill_all(job)
        return
    first = run.saved_step() + 1
    step = min(first + scene.random.randrange(4), run.last_step)
    job = scene.start(nan_steps=[(step, scene.random.randrange(scene.num_ranks))])
    status = scene.failure_of(job) if first > run.last_step else scene.end_of(job)
    if status != launcher.DIVERGED:
        raise LostError(f"step {step} met NaN, and the job ended with status {status}")
    _expect_sentence(job)


def _expect_sentence(job: Job) -> None:
    if "Traceback (most recent call last)" in job.text():
        raise LostError("the job says it with a traceback")


KINDS = {
    "job": Kind("launcher and all ranks are killed", _kill_all, number=4),
    "save": Kind("the same, in the middle of a save", _kill_in_a_save, number=4),
    "rank": Kind("one rank is killed", _kill_rank, number=4, least_processes=2),
    "launcher": Kind("the launcher is killed", _kill_launcher, number=4, least_processes=2),
    "terminate": Kind("the job is asked to stop (SIGTERM)", _terminate),
    "stop": Kind("a rank is stopped (SIGSTOP)", _stop_rank, number=1),
    "flip": Kind("a bit of the newest checkpoint flips", _flip, number=4),
    "truncate": Kind("a file of the newest checkpoint is cut", _truncate),
    "disk": Kind("the disk has no room for a checkpoint", _fill_disk),
    "nan": Kind("a gradient is NaN", _meet_nan),
}
