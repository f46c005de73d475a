"""Tables of the rankings of a group, as plain text."""

from __future__ import annotations

from megapoly.study.report.cells import NONE, Cell, Table, signed
from megapoly.study.report.groups import Entry, RunGroup
from megapoly.study.report.ranking import Ranking, rankings


def ranking_tables(group: RunGroup) -> list[Table]:
    """Return a table for each ranking of the group, the best line first."""
    return [_ranking_table(group, ranking) for ranking in rankings(group)]


def _ranking_table(group: RunGroup, ranking: Ranking) -> Table:
    best, reference = ranking.entries[0], group.reference
    against = reference if reference in ranking and reference is not best else None
    rows = []
    for entry in ranking.entries:
        cells = [
            Cell(f"{ranking.mean(entry):.4f}", best=entry in ranking.bold),
            Cell(NONE if entry is best else signed(ranking.difference(entry, best), 4)),
        ]
        if against is not None:
            gap = signed(ranking.difference(entry, against), 4)
            cells.append(Cell(NONE if entry is against else gap))
        cells.append(Cell(_tuning(entry)))
        rows.append((entry.label, cells))
    columns = ["activation", f"{group.ranked_by} loss", f"minus {best.label}"]
    if against is not None:
        columns.append(f"minus {against.label}")
    title = f"Ranking on {ranking.seed_names}"
    return Table(title, [*columns, "rates tried"], rows, _ranking_notes(ranking))


def _ranking_notes(ranking: Ranking) -> list[str]:
    model, lines = ranking.fit, len(ranking.entries)
    limit = f"{model.half_interval:.4f}"
    notes = [
        f"Means over the seeds that all {lines} lines have. Two lines are distinguished if their "
        f"means differ by more than {limit}, half of the simultaneous 95 % interval of all "
        f"differences: Tukey's studentized range for {lines} lines and {model.degrees} degrees of "
        f"freedom, times {model.deviation:.4f} / sqrt({len(ranking.seeds)}), where "
        f"{model.deviation:.4f} is the standard deviation of a run about line and seed, pooled "
        "over the lines.",
        "Bold: the lowest, and the lines that cannot be distinguished from it."
        if ranking.bold
        else "None is bold: no two lines can be distinguished.",
    ]
    if model.correlation is not None:
        notes.append(f"Correlation of runs of one seed: {signed(model.correlation, 2)}.")
    return notes


def _tuning(entry: Entry) -> str:
    count = len(entry.tried)
    return "1, untuned" if count == 1 else str(count)
