"""A comparison from its first trial to its last: the grid of learning rates, then the seeds."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from megapoly.comparison.jobs import Job, JobRunner, TrialError
from megapoly.comparison.lock import sole_use
from megapoly.comparison.outcome import final_validation_loss, is_complete
from megapoly.comparison.record import Record
from megapoly.comparison.trials import Trial, Variant, rate_trials, seed_trials
from megapoly.config import Config, load_yaml, to_yaml
from megapoly.config.parsing import to_dict
from megapoly.config.resolve import train_iters
from megapoly.data.files import write_text
from megapoly.errors import ConfigError

RATES, SEEDS = "rates", "seeds"


@dataclass(frozen=True)
class Study:
    """What is compared, and how it is run.

    Args:
        base: configuration of all trials, which set activation, rate, seed and folder.
        variants: activations.
        rates: grid of learning rates; one: that of all, without a grid.
        seeds: the first is that of the grid.
        output: folder of the trials.
        launcher: words that start a job, before its ``--config FILE``.
        at_once: jobs at a time.
        environment: variables of the jobs, beside those of this process.
    """

    base: Config
    variants: Sequence[Variant]
    rates: Sequence[float]
    seeds: Sequence[int]
    output: Path
    launcher: Sequence[str]
    at_once: int
    environment: Mapping[str, str]

    @property
    def num_trials(self) -> int:
        """Trials of both phases, of which those of the grid's best rate are in both."""
        return len(self.variants) * (len(self.rates) + len(self.seeds) - 1)

    def names(self) -> Iterator[str]:
        """Folders of all trials; of later seeds the rate is open until the grid is done."""
        for trial in rate_trials(self.variants, self.rates, self.seeds[0]):
            yield trial.name
        for seed in self.seeds[1:]:
            for variant in self.variants:
                grid = len(self.rates) > 1
                rate = "(best)" if grid else f"{self.rates[0]:g}"
                yield f"{variant.name}.lr_{rate}.seed_{seed}"

    def run(self, record: Record, console: Console) -> dict[Variant, float]:
        """Train what is not complete.

        A rate of the grid at which the loss is not finite is not chosen, and not tried again.

        Args:
            record: of the comparison; written after every trial.
            console: for progress.

        Returns:
            The learning rate of each activation: of the grid's rates the one with the lowest
            validation loss at the end.

        Raises:
            ConfigError: the folder holds trials of another configuration, or another comparison is
                at work in it.
            TrialError: jobs failed, or diverged at every rate of the grid or with a later seed.
            CheckpointError: a complete run lacks its validation losses.
        """
        grid = rate_trials(self.variants, self.rates, self.seeds[0])
        phases = {trial.name: RATES for trial in grid} if len(self.rates) > 1 else {}

        def on_end(job: Job, seconds: float, diverged: bool) -> None:
            phase = phases.get(job.name, SEEDS)
            record.add(job.name, phase=phase, seconds=seconds, diverged=diverged)
            write()

        with sole_use(self.output) as lock:
            self._check_same()
            with _timed(record) as write:
                runner = JobRunner(
                    console,
                    at_once=self.at_once,
                    total=self.num_trials,
                    on_end=on_end,
                    inherited=[] if lock is None else [lock],
                )
                self._run(runner, grid, record)
                chosen = self._best_rates(record)
                record.chosen = {v.name: Trial(v, chosen[v], self.seeds[0]).name for v in chosen}
                later = seed_trials(self.variants, chosen, self.seeds[1:])
                self._run(runner, later, record)
                self._check_finite(later, record)
        return chosen

    def _best_rates(self, record: Record) -> dict[Variant, float]:
        if len(self.rates) == 1:
            rate = self.rates[0]
            self._check_finite([Trial(v, rate, self.seeds[0]) for v in self.variants], record)
            return dict.fromkeys(self.variants, rate)
        chosen, none = {}, []
        for variant in self.variants:
            losses = {lr: self._final_loss(variant, lr, record) for lr in self.rates}
            chosen[variant] = min(losses, key=lambda lr: losses[lr])
            if losses[chosen[variant]] == math.inf:
                none.append(variant.name)
        if none:
            raise TrialError(
                f"Training must end with a finite loss at one of the rates at least; "
                f"{', '.join(none)} did at none. Add lower ones to `--learning-rates`."
            )
        return chosen

    def _final_loss(self, variant: Variant, lr: float, record: Record) -> float:
        """Validation loss at the end; infinite if it is not finite."""
        run_dir = self.output / Trial(variant, lr, self.seeds[0]).name
        loss = math.inf if record.diverged(run_dir) else final_validation_loss(run_dir)
        return loss if math.isfinite(loss) else math.inf

    def _check_finite(self, trials: Sequence[Trial], record: Record) -> None:
        """Means over seeds, or of activations at one rate, must not leave out who diverged."""
        names = [trial.name for trial in trials if record.diverged(self.output / trial.name)]
        if names:
            raise TrialError(
                f"The loss of every seed must stay finite at its activation's learning rate; that "
                f"of {', '.join(names)} did not. Ask for lower `--learning-rates`, or for a longer "
                "warm-up in another `--output`."
            )

    def _run(self, runner: JobRunner, trials: Sequence[Trial], record: Record) -> None:
        todo = []
        for job in map(self._job, trials):
            complete = is_complete(job.run_dir, job.steps)
            if complete or record.diverged(job.run_dir):
                runner.skip(job, diverged=not complete)
            else:
                todo.append(job)
        for trial in trials:
            write_text(self._recipe(trial), to_yaml(trial.config(self.base, self.output)))
        record.write()
        runner.run(todo)

    def _job(self, trial: Trial) -> Job:
        return Job(
            name=trial.name,
            command=[*self.launcher, "--config", str(self._recipe(trial))],
            run_dir=self.output / trial.name,
            log=self.output / "logs" / f"{trial.name}.log",
            steps=train_iters(self.base),
            environment=self.environment,
        )

    def _recipe(self, trial: Trial) -> Path:
        return self.output / "recipes" / f"{trial.name}.yaml"

    def _check_same(self) -> None:
        """Trials of the folder must be what this comparison makes of their names.

        Those that the grid's outcome may yet ask for, too: that would be refused hours later.
        """
        problems = []
        for trial in itertools.starmap(
            Trial, itertools.product(self.variants, self.rates, self.seeds)
        ):
            if not self._recipe(trial).exists():
                continue
            there = load_yaml(self._recipe(trial))
            asked = trial.config(self.base, self.output)
            problems += [
                f"{trial.name} is in `--output` ({self.output}) with {name} {old} where {new} is "
                "asked for; choose another folder, or delete the trial's"
                for name, old, new in _differences(to_dict(there), to_dict(asked))
            ]
        if problems:
            raise ConfigError(problems)


def _differences(
    there: dict[str, Any], asked: dict[str, Any], prefix: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    for key in asked:
        if isinstance(asked[key], dict) and isinstance(there.get(key), dict):
            yield from _differences(there[key], asked[key], f"{prefix}{key}.")
        elif there.get(key) != asked[key]:
            yield f"`{prefix}{key}`", there.get(key), asked[key]


@contextmanager
def _timed(record: Record) -> Iterator[Callable[[], None]]:
    """Count the time of this call, however it ends; what is yielded writes it down so far."""
    earlier, start = record.wall_time_s, time.monotonic()

    def write() -> None:
        record.wall_time_s = earlier + time.monotonic() - start
        record.write()

    try:
        yield write
    finally:
        write()
