"""The soak itself: a run without faults, then runs that meet one fault after another."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megapoly.errors import MegapolyError
from megapoly.testing.soak.kinds import KINDS, EndedError, LostError, Scene
from megapoly.testing.soak.run import Reference, Run
from megapoly.testing.soak.started_jobs import Jobs, NanStep, kill, wait_until

# Long enough for every process of an ended job to be gone; waited for only where one stays.
_LEFTOVERS_S = 30.0
_LEAST_SAVES = 4  # of a run: a fault that damages a checkpoint needs one before it, and one after
_SHOWN_LINES = 12
# Runs that end before the moment of one fault: the first may have been near its end, and a moment
# that was drawn can come too late.
_MOST_COMPLETE = 5


@dataclass(frozen=True)
class Plan:
    """What to do.

    Args:
        argv: arguments of ``megapoly train`` without ``--run_dir``.
        folder: for runs and logs; empty.
        num_processes: of the job.
        num_faults: faults in total.
        kinds: names of those to draw from.
        seed: of kinds, moments and victims.
        nan_steps: steps that meet NaN in every run, the uninterrupted one as well.
        new_processes: see :class:`~megapoly.testing.soak.started_jobs.Jobs`.
        timeout_s: longest wait for a job to do what it must.
    """

    argv: Sequence[str]
    folder: Path
    num_processes: int
    num_faults: int
    kinds: Sequence[str]
    seed: int
    nan_steps: tuple[NanStep, ...] = ()
    new_processes: bool = False
    timeout_s: float = 300.0


@dataclass(frozen=True)
class Outcome:
    """A fault and what became of the run.

    Args:
        kind: name of the kind; None for the comparison of a complete run.
        run: name of the run's folder.
        log: what the jobs printed.
        seconds: until the next fault could strike.
        problem: why the run is lost; None if it survived.
    """

    kind: str | None
    run: str
    log: Path
    seconds: float
    problem: str | None


@dataclass
class Soak:
    """Faults one after another; iterate over it for their outcomes.

    Args:
        plan: what to do.
        say: is told what happens at the moment.
    """

    plan: Plan
    say: Callable[[str], None] = lambda text: None
    _num_runs: int = field(default=0, init=False)

    def outcomes(self) -> Iterator[Outcome]:
        """Train without faults, then let faults strike; yield the outcome of each.

        A run that reaches its last step is compared with the one without faults, which is an
        outcome of its own; the next fault strikes a new run.

        Raises:
            MegapolyError: the job fails without a fault, or is too short for faults.
        """
        plan = self.plan
        plan.folder.mkdir(parents=True, exist_ok=True)
        with Jobs(
            plan.folder / ".pids",
            num_processes=plan.num_processes,
            new_processes=plan.new_processes,
        ) as jobs:
            self.say("a run without faults")
            reference = self._train_without_faults(jobs)
            run: Run | None = None
            for number, kind in zip(range(plan.num_faults), self._kinds(), strict=False):
                drawn = random.Random(f"{plan.seed}/{number}")
                outcome: Outcome | None = None
                num_complete = 0
                while outcome is None:
                    run = run or self._new_run(reference)
                    log = plan.folder / "logs" / f"{number + 1:04d}_{kind}.log"
                    self.say(f"{KINDS[kind].summary}, {run.folder.name} at {run.saved_step()}")
                    outcome = self._strike(kind, Scene(
                        jobs, self._argv(run.folder), run, drawn, log, plan.timeout_s
                    ))  # fmt: skip
                    if outcome is None:
                        num_complete += 1
                        if num_complete > _MOST_COMPLETE:
                            raise MegapolyError(
                                f"The run is over before a fault can strike ({KINDS[kind].summary})"
                                "; set a longer `training.train_iters` or a shorter "
                                "`checkpoint.save_interval`."
                            )
                        yield self._compare(run)
                        run = None
                yield outcome
                if outcome.problem is not None:
                    run = None  # its folder stays, to be looked at
            if run is not None:
                self.say("the last run, to its end")
                yield self._train_to_end(jobs, run)

    def _kinds(self) -> Iterator[str]:
        """Yield the kinds to strike: every few dozen have each kind as often as it is to strike."""
        plan, drawn = self.plan, random.Random(self.plan.seed)
        possible = [n for n in plan.kinds if KINDS[n].least_processes <= plan.num_processes]
        while True:
            deck = [name for name in possible for _ in range(KINDS[name].number)]
            drawn.shuffle(deck)
            yield from deck

    def _new_run(self, reference: Reference) -> Run:
        self._num_runs += 1
        return Run(self.plan.folder / f"run_{self._num_runs:04d}", reference)

    def _argv(self, run_dir: Path) -> list[str]:
        return [*self.plan.argv, "--run_dir", str(run_dir)]

    def _train_without_faults(self, jobs: Jobs) -> Reference:
        """Train the run that the others must equal, and measure when it saves."""
        folder, log = self.plan.folder / "without_faults", self._log("without_faults")
        run = Run(folder, Reference(folder, (), 0.0, 0.0))
        begin = time.monotonic()
        job = jobs.start(self._argv(folder), log=log, nan_steps=self.plan.nan_steps)
        saves: list[tuple[int, float]] = []
        saving_s, previous, first_step_s = 0.0, begin, None
        while job.status() is None:
            time.sleep(0.002)
            present = time.monotonic()
            if run.partial_checkpoints():
                saving_s += present - previous
            if (folder / "metrics.jsonl").exists() and first_step_s is None:
                first_step_s = present - begin
            if len(saves) == 0 or run.saved_step() != saves[-1][0]:
                saves.append((run.saved_step(), present))
            previous = present
        if job.status() != 0:
            lines = job.text().splitlines()[-_SHOWN_LINES:]
            raise MegapolyError("\n".join(["The job fails without a fault:", *lines]))
        times = [time for step, time in saves if step > 0]
        if len(times) < _LEAST_SAVES:
            raise MegapolyError(
                f"The job saves {len(times)} checkpoints; a soak needs at least {_LEAST_SAVES}. "
                "Set a longer `training.train_iters` or a shorter `checkpoint.save_interval`."
            )
        mean_s = saving_s / len(times)
        return Reference(folder, self.plan.nan_steps, mean_s, first_step_s or 0.0)

    def _strike(self, name: str, scene: Scene) -> Outcome | None:
        """Let a fault strike; None if the run was complete before."""
        begin, run = time.monotonic(), scene.run
        problem = None
        try:
            KINDS[name].strike(scene)
        except EndedError as error:
            if error.status == 0 and run.saved_step() == run.last_step:
                return None
            problem = str(error)
        except LostError as error:
            problem = str(error)
        problem = problem or self._left_over(scene.jobs) or next(self._lost(scene), None)
        kill(scene.jobs.processes(), signal.SIGKILL)
        return Outcome(name, run.folder.name, scene.log, time.monotonic() - begin, problem)

    def _lost(self, scene: Scene) -> Iterator[str]:
        run = scene.run
        if run.saved_step() < scene.saved_step:
            yield f"step {scene.saved_step} was saved, and the newest is {run.saved_step()}"
        yield from run.problems()

    def _left_over(self, jobs: Jobs) -> str | None:
        if wait_until(lambda: not jobs.processes(), _LEFTOVERS_S):
            return None
        found = jobs.processes()
        kill(found, signal.SIGKILL)
        shown = "; ".join(command[-100:] for command in found.values())
        return f"{len(found)} processes are left {_LEFTOVERS_S:g} s after the job: {shown}"

    def _train_to_end(self, jobs: Jobs, run: Run) -> Outcome:
        begin, log = time.monotonic(), self._log(run.folder.name)
        nan_steps = run.reference.nan_steps
        job = jobs.start(self._argv(run.folder), log=log, nan_steps=nan_steps)
        status = job.wait(self.plan.timeout_s)
        if status != 0:
            problem = f"the job ended with status {status}" if status else "the job did not end"
            kill(jobs.processes(), signal.SIGKILL)
            return Outcome(None, run.folder.name, log, time.monotonic() - begin, problem)
        return self._compare(run)

    def _compare(self, run: Run) -> Outcome:
        begin = time.monotonic()
        problem = next(run.problems_at_end(), None)
        if problem is None:
            run.delete()
        log = self._log(run.folder.name)
        return Outcome(None, run.folder.name, log, time.monotonic() - begin, problem)

    def _log(self, name: str) -> Path:
        folder = self.plan.folder / "logs"
        folder.mkdir(exist_ok=True)
        return folder / f"{name}.log"
