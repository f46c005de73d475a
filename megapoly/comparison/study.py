"""A comparison from its first trial to its last: the grid of learning rates, then the seeds."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from megapoly.comparison.jobs import Job, JobRunner
from megapoly.comparison.outcome import final_validation_loss, is_complete
from megapoly.comparison.record import Record
from megapoly.comparison.trials import Trial, Variant, rate_trials, seed_trials
from megapoly.config import Config, load_yaml, to_yaml
from megapoly.config.parsing import to_dict
from megapoly.config.resolve import train_iters
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

        Args:
            record: of the comparison; written after every trial.
            console: for progress.

        Returns:
            The learning rate of each activation: of the grid's rates the one with the lowest
            validation loss at the end.

        Raises:
            ConfigError: the folder holds trials of another configuration.
            TrialError: jobs failed.
            CheckpointError: a complete run lacks its validation losses.
        """
        grid = rate_trials(self.variants, self.rates, self.seeds[0])
        phases = {trial.name: RATES for trial in grid} if len(self.rates) > 1 else {}
        self._check_same(grid)
        with _timed(record):
            runner = JobRunner(
                console,
                at_once=self.at_once,
                total=self.num_trials,
                on_end=lambda job, seconds: record.add(
                    job.name, phase=phases.get(job.name, SEEDS), seconds=seconds
                ),
            )
            self._run(runner, grid, record)
            chosen = {variant: self._best_rate(variant) for variant in self.variants}
            record.chosen = {v.name: Trial(v, chosen[v], self.seeds[0]).name for v in chosen}
            self._run(runner, seed_trials(self.variants, chosen, self.seeds[1:]), record)
        return chosen

    def _best_rate(self, variant: Variant) -> float:
        folders = {lr: self.output / Trial(variant, lr, self.seeds[0]).name for lr in self.rates}
        if len(folders) == 1:
            return self.rates[0]
        return min(folders, key=lambda lr: final_validation_loss(folders[lr]))

    def _run(self, runner: JobRunner, trials: Sequence[Trial], record: Record) -> None:
        jobs = [self._job(trial) for trial in trials]
        todo = []
        for job in jobs:
            if is_complete(job.run_dir, job.steps):
                runner.skip(job)
            else:
                todo.append(job)
        self._check_same(trials)
        for trial in trials:
            path = self._recipe(trial)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(to_yaml(trial.config(self.base, self.output)))
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

    def _check_same(self, trials: Sequence[Trial]) -> None:
        """Trials of the folder must be what this comparison makes of their names."""
        problems = []
        for trial in trials:
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
def _timed(record: Record) -> Iterator[None]:
    """Count the time of this call, however it ends."""
    start = time.monotonic()
    try:
        yield
    finally:
        record.wall_time_s += time.monotonic() - start
        record.write()
