"""A comparison from its first trial to its last: the grid of learning rates, then the seeds."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from megapoly.config import Config, load_yaml, to_yaml
from megapoly.config.parsing import to_dict
from megapoly.config.resolve import train_iters
from megapoly.errors import ConfigError
from megapoly.platform.files import write_text
from megapoly.study.comparison.jobs import JobRunner, TrialJob
from megapoly.study.comparison.lock import sole_use
from megapoly.study.comparison.outcome import final_validation_loss, is_complete
from megapoly.study.comparison.record import ComparisonRecord
from megapoly.study.comparison.trials import Trial, Variant, rate_trials, seed_trials

RATES, SEEDS = "rates", "seeds"


@dataclass(frozen=True)
class Comparison:
    """A comparison: its trials, and how they are run.

    Args:
        base: configuration of all trials; each sets activation, rate, seed and folder.
        variants: activations.
        rates: grid of learning rates; a single rate is used for all, without a grid.
        seeds: the grid uses the first.
        margin: of validation loss. Rates at which an activation's loss with the first seed is
            within this margin of its best are also trained with the other seeds.
        output: folder of the trials.
        launcher: command that starts a job; ``--config FILE`` is appended.
        at_once: number of jobs that run at the same time.
        environment: variables of the jobs, in addition to this process's.
    """

    base: Config
    variants: Sequence[Variant]
    rates: Sequence[float]
    seeds: Sequence[int]
    margin: float
    output: Path
    launcher: Sequence[str]
    at_once: int
    environment: Mapping[str, str]

    @property
    def num_trials(self) -> int:
        """Number of trials, grid and seeds; a margin that admits several rates adds to it."""
        return len(self.variants) * (len(self.rates) + len(self.seeds) - 1)

    def names(self) -> Iterator[str]:
        """Yield the folders of all trials; the rates of later seeds depend on the grid."""
        for trial in rate_trials(self.variants, self.rates, self.seeds[0]):
            yield trial.name
        for seed in self.seeds[1:]:
            for variant in self.variants:
                grid = len(self.rates) > 1
                best = f"(best, within {self.margin:g})" if self.margin else "(best)"
                rate = best if grid else f"{self.rates[0]:g}"
                yield f"{variant.name}.lr_{rate}.seed_{seed}"

    def run(self, record: ComparisonRecord, console: Console) -> dict[Variant, float]:
        """Train the trials that are not complete.

        A rate at which the loss is not finite, with any seed, is ruled out and not tried again.

        Args:
            record: of the comparison; written after every trial.
            console: for progress.

        Returns:
            The learning rate of each activation: among the rates that have all seeds, the one with
            the lowest final validation loss, mean over seeds. An activation is missing if none of
            its rates has a finite loss with every seed.

        Raises:
            ConfigError: the folder contains trials of another configuration, or another comparison
                is running in it.
            TrialError: jobs failed.
            CheckpointError: a complete run lacks its validation losses.
        """
        grid = rate_trials(self.variants, self.rates, self.seeds[0])
        phases = {trial.name: RATES for trial in grid} if len(self.rates) > 1 else {}

        def on_end(job: TrialJob, seconds: float, diverged: bool) -> None:
            phase = phases.get(job.name, SEEDS)
            record.add(job.name, phase=phase, seconds=seconds, diverged=diverged)
            record.write()

        with sole_use(self.output) as lock:
            self._check_same()
            runner = JobRunner(
                console,
                at_once=self.at_once,
                total=self.num_trials,
                on_end=on_end,
                inherited=[] if lock is None else [lock],
            )
            self._run(runner, grid, record)
            nearest = {variant: self._nearest(variant, record) for variant in self.variants}
            later = seed_trials(nearest, self.seeds[1:])
            runner.total = len(grid) + len(later)
            self._run(runner, later, record)
            chosen = self._best(nearest, record)
            for variant in self.variants:
                record.chosen.pop(variant.name, None)
            record.chosen |= {v.name: Trial(v, lr, self.seeds[0]).name for v, lr in chosen.items()}
            record.write()
        return chosen

    def _best(
        self, rates: Mapping[Variant, Sequence[float]], record: ComparisonRecord
    ) -> dict[Variant, float]:
        chosen = {}
        for variant, own in rates.items():
            losses = {lr: self._mean_loss(variant, lr, self.seeds, record) for lr in own}
            finite = [lr for lr in own if math.isfinite(losses[lr])]
            if finite:
                chosen[variant] = min(finite, key=lambda lr: losses[lr])
        return chosen

    def _nearest(self, variant: Variant, record: ComparisonRecord) -> list[float]:
        """Return the rates whose first seed has a finite loss within the margin of the best."""
        first = self.seeds[:1]
        losses = {lr: self._mean_loss(variant, lr, first, record) for lr in self.rates}
        limit = min(losses.values()) + self.margin
        return [lr for lr, loss in losses.items() if math.isfinite(loss) and loss <= limit]

    def _mean_loss(
        self, variant: Variant, lr: float, seeds: Sequence[int], record: ComparisonRecord
    ) -> float:
        """Return the final validation loss, mean over seeds; infinite if one is not finite."""
        losses = []
        for seed in seeds:
            run_dir = self.output / Trial(variant, lr, seed).name
            losses.append(math.inf if record.diverged(run_dir) else final_validation_loss(run_dir))
        mean = sum(losses) / len(losses)
        return mean if math.isfinite(mean) else math.inf

    def _run(self, runner: JobRunner, trials: Sequence[Trial], record: ComparisonRecord) -> None:
        todo = []
        for job in map(self._job, trials):
            complete = is_complete(job.run_dir, job.steps)
            if complete or record.diverged(job.run_dir):
                runner.skip(job, diverged=not complete)
            else:
                record.forget(job.run_dir)
                todo.append(job)
        for trial in trials:
            write_text(self._recipe(trial), to_yaml(trial.config(self.base, self.output)))
        record.write()
        runner.run(todo)

    def _job(self, trial: Trial) -> TrialJob:
        return TrialJob(
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
        """Check that the trials of the folder have the configuration that their names get here.

        This includes trials that the outcome of the grid may still require: otherwise they would
        be refused hours later.
        """
        problems = []
        for trial in itertools.starmap(
            Trial, itertools.product(self.variants, self.rates, self.seeds)
        ):
            if not self._recipe(trial).exists():
                continue
            there = load_yaml(self._recipe(trial))
            requested = trial.config(self.base, self.output)
            problems += [
                f"{trial.name} is in `--output` ({self.output}) with {name} {old} where {new} is "
                "requested; choose another folder, or delete the trial's"
                for name, old, new in _differences(to_dict(there), to_dict(requested))
            ]
        if problems:
            raise ConfigError(problems)


def _differences(
    there: dict[str, Any], requested: dict[str, Any], prefix: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    """Yield name, value there and requested value of each option that differs."""
    for key, value in requested.items():
        if isinstance(value, dict) and isinstance(there.get(key), dict):
            yield from _differences(there[key], value, f"{prefix}{key}.")
        # The folder itself may have been moved, or be spelled differently.
        elif prefix + key != "run_dir" and there.get(key) != value:
            yield f"`{prefix}{key}`", there.get(key), value
