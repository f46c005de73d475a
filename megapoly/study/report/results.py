"""What the runs of a group say: losses with their spread, differences, tokens to reach a loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from megapoly.config.data_sources import MEAN
from megapoly.study.report.groups import Entry, RunGroup, final_loss
from megapoly.study.report.runs import Run
from megapoly.study.report.statistics import SeedStatistics, first_crossing, paired, seed_statistics


@dataclass(frozen=True)
class Difference:
    """An entry against another one, over the seeds that both have.

    Args:
        spread: of the differences.
        below: seeds in which the entry's loss is the lower one.
    """

    spread: SeedStatistics
    below: int

    @property
    def clear(self) -> bool:
        """Whether the mean's 95 % interval (Student's t) leaves out zero."""
        half = self.spread.half_interval
        return half is not None and abs(self.spread.mean) > half


@dataclass(frozen=True)
class Reach:
    """Share of a run's tokens after which an entry reaches a reference's final loss.

    Args:
        shares: by seed, of those that reach it.
        seeds: that were compared.
    """

    shares: dict[str, float]
    seeds: int

    @property
    def spread(self) -> SeedStatistics | None:
        """Over the seeds that reach it."""
        return seed_statistics(list(self.shares.values()))


def values(entry: Entry, read: Callable[[Run], float | None]) -> dict[str, float | None]:
    """A number of each run at the entry's learning rate, by seed."""
    return {seed: read(run) for seed, run in entry.seeds.items()}


def known(numbers: dict[str, float | None]) -> SeedStatistics | None:
    """Mean and deviation over seeds; None if a run has none, as where its loss is not finite."""
    found = [number for number in numbers.values() if number is not None]
    return seed_statistics(found) if len(found) == len(numbers) else None


def training_loss(run: Run) -> float | None:
    """Of the last steps."""
    return run.training_loss


def validation_loss(domain: str = MEAN) -> Callable[[Run], float | None]:
    """The final one of a domain."""
    return lambda run: run.validation_loss(domain)


def perplexity(domain: str = MEAN) -> Callable[[Run], float | None]:
    """Exp of the final validation loss."""

    def read(run: Run) -> float | None:
        loss = run.validation_loss(domain)
        return None if loss is None or loss > 700 else math.exp(loss)

    return read


def difference(
    entry: Entry, other: Entry, read: Callable[[Run], float | None] = final_loss
) -> Difference | None:
    """``entry`` minus ``other``.

    Returns:
        None if they share no seed, or one of the runs to compare has no finite value: the mean over
        the others would leave out the worst.
    """
    own, others = values(entry, read), values(other, read)
    found = list(paired(own, others).values())
    found_spread = seed_statistics(found)
    if found_spread is None or len(found) < len(own.keys() & others.keys()):
        return None
    return Difference(found_spread, sum(value < 0 for value in found))


def reach(entry: Entry, reference: Entry, *, validation: bool) -> Reach | None:
    """When ``entry`` is first at or below the final loss of ``reference``, seed by seed.

    A run that ends above it has not reached it: losses of batches differ, and one that was below
    for a while read easier ones.

    Args:
        entry: whose curve is read, linear between its points.
        reference: whose last value is the target.
        validation: the mean validation loss; false: the smoothed training loss.

    Returns:
        None where they share no seed, or nothing was validated before the end.
    """
    shares, seeds = {}, 0
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
            shares[seed] = crossing / run.tokens
    return Reach(shares, seeds) if seeds else None


def domains(group: RunGroup) -> list[str]:
    """Validation sets of a group, in the order of its runs."""
    return group.runs[0].domains


def tasks(group: RunGroup) -> list[str]:
    """Benchmark tasks that any of the tables' runs has a score in."""
    runs = [run for entry in group.entries for run in entry.seeds.values()]
    return list(dict.fromkeys(task for run in runs for task in run.tasks))
