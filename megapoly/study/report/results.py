"""Results of a group: losses with their spread, differences, and tokens to reach a loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from megapoly.config.data_sources import MEAN
from megapoly.study.report.costs import times_compare, training_flops
from megapoly.study.report.groups import Entry, RunGroup, final_loss
from megapoly.study.report.runs import Run
from megapoly.study.report.statistics import SeedStatistics, first_crossing, paired, seed_statistics


@dataclass(frozen=True)
class Difference:
    """Difference of two entries, over the seeds that both have.

    Args:
        mean: of the differences.
        below: number of seeds in which the entry's loss is the lower one.
        count: number of seeds.
    """

    mean: float
    below: int
    count: int


@dataclass(frozen=True)
class Reach:
    """Share of the reference's run after which an entry reaches the reference's final loss.

    Args:
        tokens: share of the tokens by seed, for the seeds that reach it.
        flops: share of the model FLOPs.
        time: share of the wall time; only of pairs of runs whose times compare.
        seeds: number of seeds that were compared.
    """

    tokens: dict[str, float]
    flops: dict[str, float]
    time: dict[str, float]
    seeds: int

    @property
    def always(self) -> bool:
        """Whether every seed reaches it."""
        return len(self.tokens) == self.seeds


def values(entry: Entry, read: Callable[[Run], float | None]) -> dict[str, float | None]:
    """Return a number of each run at the entry's learning rate, by seed."""
    return {seed: read(run) for seed, run in entry.seeds.items()}


def known(numbers: dict[str, float | None]) -> SeedStatistics | None:
    """Return mean and deviation over seeds; None if one is missing, such as a loss that is NaN."""
    found = [number for number in numbers.values() if number is not None]
    return seed_statistics(found) if len(found) == len(numbers) else None


def training_loss(run: Run) -> float | None:
    """Return the training loss of the last steps."""
    return run.training_loss


def validation_loss(domain: str = MEAN) -> Callable[[Run], float | None]:
    """Return a reader of the final validation loss of a domain."""
    return lambda run: run.validation_loss(domain)


def perplexity(domain: str = MEAN) -> Callable[[Run], float | None]:
    """Return a reader of exp of the final validation loss."""

    def read(run: Run) -> float | None:
        loss = run.validation_loss(domain)
        return None if loss is None or loss > 700 else math.exp(loss)

    return read


def difference(
    entry: Entry, other: Entry, read: Callable[[Run], float | None] = final_loss
) -> Difference | None:
    """Return the difference ``entry`` minus ``other``.

    Returns:
        None if they share no seed, or if one of the runs to compare has no finite value: the mean
        over the other runs would leave out the worst.
    """
    own, others = values(entry, read), values(other, read)
    found = list(paired(own, others).values())
    if not found or len(found) < len(own.keys() & others.keys()):
        return None
    mean = math.fsum(found) / len(found)
    return Difference(mean, sum(value < 0 for value in found), len(found))


def reach(entry: Entry, reference: Entry, *, validation: bool) -> Reach | None:
    """Find where ``entry`` is first at or below the final loss of ``reference``, seed by seed.

    A run that ends above that loss has not reached it: losses of batches differ, and a curve that
    is below for a while has only read easier ones.

    Args:
        entry: its curve is linear between its points.
        reference: its last value is the target.
        validation: read the mean validation loss; false: the smoothed training loss.

    Returns:
        None if they share no seed, or there was no validation before the end.
    """
    found, seeds = Reach({}, {}, {}, 0), 0
    for seed, run in entry.seeds.items():
        other = reference.seeds.get(seed)
        if other is None:
            continue
        target = other.validation_loss() if validation else other.training_loss
        tokens, losses = run.curve(validation=validation)
        if target is None or len(tokens) < 2:
            continue
        seeds += 1
        crossing = first_crossing(tokens, losses, target)
        if crossing is not None and losses[-1] is not None and losses[-1] <= target:
            share = crossing / run.tokens
            found.tokens[seed] = share
            found.flops[seed] = share * training_flops(run) / training_flops(other)
            if times_compare(run, other):
                found.time[seed] = share * run.wall_time_s / other.wall_time_s
    return replace(found, seeds=seeds) if seeds else None


def domains(group: RunGroup) -> list[str]:
    """Return the validation sets of a group, in the order of its runs."""
    return group.runs[0].domains


def tasks(group: RunGroup) -> list[str]:
    """Return the benchmark tasks in which any run of the tables has a score."""
    runs = [run for entry in group.entries for run in entry.seeds.values()]
    return list(dict.fromkeys(task for run in runs for task in run.tasks))
