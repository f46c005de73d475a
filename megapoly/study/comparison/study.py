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
from megapoly.data.files import write_text
from megapoly.errors import ConfigError
from megapoly.study.comparison.jobs import Job, JobRunner
from megapoly.study.comparison.lock import sole_use
from megapoly.study.comparison.outcome import final_validation_loss, is_complete
from megapoly.study.comparison.record import Record
from megapoly.study.comparison.trials import Trial, Variant, rate_trials, seed_trials

RATES, SEEDS = "rates", "seeds"


@dataclass(frozen=True)
class Study:
    """What is compared, and how it is run.

    Args:
        base: configuration of all trials, which set activation, rate, seed and folder.
        variants: activations.
        rates: grid of learning rates; one: that of all, without a grid.
        seeds: the first is that of the grid.
        margin: of validation loss; of an activation's rates those that the first seed puts so near
            to its best one are trained with the other seeds, too.
        output: folder of the trials.
        launcher: words that start a job, before its ``--config FILE``.
        at_once: jobs at a time.
        environment: variables of the jobs, beside those of this process.
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
        """Trials of both phases; more where a margin takes several rates to the other seeds."""
        return len(self.variants) * (len(self.rates) + len(self.seeds) - 1)

    def names(self) -> Iterator[str]:
        """Folders of all trials; of later seeds the rate is open until the grid is done."""
        for trial in rate_trials(self.variants, self.rates, self.seeds[0]):
            yield trial.name
        for seed in self.seeds[1:]:
            for variant in self.variants:
                grid = len(self.rates) > 1
                best = f"(best, within {self.margin:g})" if self.margin else "(best)"
                rate = best if grid else f"{self.rates[0]:g}"
                yield f"{variant.name}.lr_{rate}.seed_{seed}"

    def run(self, record: Record, console: Console) -> dict[Variant, float]:
        """Train what is not complete.

        A rate at which the loss is not finite, with any seed, has lost, and is not tried again.

        Args:
            record: of the comparison; written after every trial.
            console: for progress.

        Returns:
            The learning rate of each activation: of those that have all seeds the one with the
            lowest validation loss at the end, mean over seeds. Without an activation whose loss
            was not finite with every seed at any of them.

        Raises:
            ConfigError: the folder holds trials of another configuration, or another comparison is
                at work in it.
            TrialError: jobs failed.
            CheckpointError: a complete run lacks its validation losses.
        """
        grid = rate_trials(self.variants, self.rates, self.seeds[0])
        phases = {trial.name: RATES for trial in grid} if len(self.rates) > 1 else {}

        def on_end(job: Job, seconds: float, diverged: bool) -> None:
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
        self, rates: Mapping[Variant, Sequence[float]], record: Record
    ) -> dict[Variant, float]:
        chosen = {}
        for variant, own in rates.items():
            losses = {lr: self._mean_loss(variant, lr, self.seeds, record) for lr in own}
            finite = [lr for lr in own if math.isfinite(losses[lr])]
            if finite:
                chosen[variant] = min(finite, key=lambda lr: losses[lr])
        return chosen

    def _nearest(self, variant: Variant, record: Record) -> list[float]:
        """Rates that the first seed puts within the margin of its best; none if none is finite."""
        first = self.seeds[:1]
        losses = {lr: self._mean_loss(variant, lr, first, record) for lr in self.rates}
        limit = min(losses.values()) + self.margin
        return [lr for lr, loss in losses.items() if math.isfinite(loss) and loss <= limit]

    def _mean_loss(
        self, variant: Variant, lr: float, seeds: Sequence[int], record: Record
    ) -> float:
        """Validation loss at the end, mean over seeds; infinite if one is not finite."""
        losses = []
        for seed in seeds:
            run_dir = self.output / Trial(variant, lr, seed).name
            losses.append(math.inf if record.diverged(run_dir) else final_validation_loss(run_dir))
        mean = sum(losses) / len(losses)
        return mean if math.isfinite(mean) else math.inf

    def _run(self, runner: JobRunner, trials: Sequence[Trial], record: Record) -> None:
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
        # The folder itself may have been moved, or be spelled otherwise.
        elif prefix + key != "run_dir" and there.get(key) != asked[key]:
            yield f"`{prefix}{key}`", there.get(key), asked[key]
