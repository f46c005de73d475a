"""Rankings of a group's lines, each on the seeds that all of its lines have.

Means over different seeds are never compared. Two lines are compared in the ranking that has all
the seeds that both have; a group in which some lines have more seeds than others has several.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations

from megapoly.study.report.cells import listed
from megapoly.study.report.groups import Entry, RunGroup, final_loss
from megapoly.study.report.runs import Run
from megapoly.study.report.two_way import TwoWayFit, fit

Reader = Callable[[Run], float | None]


@dataclass(frozen=True)
class Ranking:
    """Lines on the seeds that all of them have.

    Args:
        seeds: two or more.
        entries: lines, the best first.
        fit: of the two-way model; its means are in the order of ``entries``.
    """

    seeds: list[str]
    entries: list[Entry]
    fit: TwoWayFit

    def __contains__(self, entry: Entry | None) -> bool:
        return any(other is entry for other in self.entries)

    def mean(self, entry: Entry) -> float:
        """Return the mean of a line over the seeds."""
        return self.fit.means[next(i for i, e in enumerate(self.entries) if e is entry)]

    def difference(self, entry: Entry, other: Entry) -> float:
        """Return the mean of ``entry`` minus that of ``other``."""
        return self.mean(entry) - self.mean(other)

    def distinguished(self, entry: Entry, other: Entry) -> bool:
        """Return whether the simultaneous interval of the difference does not contain zero."""
        return abs(self.difference(entry, other)) > self.fit.half_interval

    @property
    def seed_names(self) -> str:
        """Return ``seeds 1 to 5``, or the seeds one by one if they are not consecutive."""
        first, last = self.seeds[0], self.seeds[-1]
        if len(self.seeds) > 2 and first.isdigit():
            if self.seeds == [str(int(first) + i) for i in range(len(self.seeds))]:
                return f"seeds {first} to {last}"
        return f"seeds {listed(self.seeds)}"

    @property
    def leaders(self) -> list[Entry]:
        """Lines that cannot be distinguished from the best, which is the first of them."""
        best = self.entries[0]
        return [entry for entry in self.entries if not self.distinguished(entry, best)]

    @property
    def bold(self) -> list[Entry]:
        """Lines that tables print bold: the leaders, if some line is not one of them."""
        return self.leaders if len(self.leaders) < len(self.entries) else []


def rankings(group: RunGroup, read: Reader = final_loss, *, highest: bool = False) -> list[Ranking]:
    """Return the rankings of a group, the one with the most seeds first.

    Args:
        group: its lines at their learning rates.
        read: number of a run by which lines are ranked.
        highest: a higher number is better.

    Returns:
        For any two lines that share two seeds, a ranking with all the seeds that both have. Lines
        of which a run diverged or has no finite number are in none: the mean over the other runs
        would leave out the worst.
    """
    results = {entry.label: _results(entry, read) for entry in group.entries}
    usable = [entry for entry in group.entries if len(results[entry.label]) > 1]
    shared = {
        frozenset(results[one.label].keys() & results[other.label].keys())
        for one, other in combinations(usable, 2)
    }
    found = []
    for seeds in shared:
        if len(seeds) < 2:
            continue
        lines = [entry for entry in usable if seeds <= results[entry.label].keys()]
        ordered = sorted(seeds, key=lambda seed: (len(seed), seed))
        table = {e.label: [results[e.label][seed] for seed in ordered] for e in lines}
        lines.sort(key=lambda e: math.fsum(table[e.label]) * (-1 if highest else 1))
        found.append(Ranking(ordered, lines, fit([table[e.label] for e in lines])))
    return sorted(found, key=lambda r: (-len(r.seeds), -len(r.entries), r.seeds))


def ranking_of(found: list[Ranking], entry: Entry, other: Entry) -> Ranking | None:
    """Return the ranking with the most seeds that has both lines; None if there is none."""
    return next((r for r in found if entry in r and other in r), None)


def unranked(group: RunGroup, found: list[Ranking], read: Reader = final_loss) -> dict[str, str]:
    """Return why a line is in no ranking, by label."""
    reasons = {}
    for entry in group.entries:
        if any(entry in ranking for ranking in found):
            continue
        if lost := lost_seeds(entry, read):
            reasons[entry.label] = f"no finite result with seed {' and '.join(lost)}"
        elif len(entry.seeds) == 1:
            reasons[entry.label] = "a single seed"
        else:
            reasons[entry.label] = "no other line shares two of its seeds"
    return reasons


def lost_seeds(entry: Entry, read: Reader = final_loss) -> list[str]:
    """Return the seeds at the line's rate whose run diverged or has no finite number."""
    missing = [seed for seed, run in entry.seeds.items() if read(run) is None]
    return [*missing, *entry.diverged.get(entry.lr, [])]


def _results(entry: Entry, read: Reader) -> dict[str, float]:
    """Return numbers by seed; empty if one is missing."""
    if lost_seeds(entry, read):
        return {}
    numbers = {seed: read(run) for seed, run in entry.seeds.items()}
    return {seed: number for seed, number in numbers.items() if number is not None}
