"""Tables of the results of a group, as plain text."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

from megapoly.config.data_sources import MEAN
from megapoly.study.report import paper, results
from megapoly.study.report.cells import NONE, Cell, Table, signed
from megapoly.study.report.groups import Entry, RunGroup, final_loss
from megapoly.study.report.ranking import Ranking, Reader, ranking_of, rankings
from megapoly.study.report.ranking_tables import ranking_tables
from megapoly.study.report.results import Difference, Reach
from megapoly.study.report.run_tables import learning_rates
from megapoly.study.report.runs import Run
from megapoly.study.report.statistics import SeedStatistics, seed_statistics


def tables(group: RunGroup) -> list[Table]:
    """Return the tables for which the group has the runs."""
    found = [*ranking_tables(group), losses(group)]
    if group.runs[0].domains:
        found.append(domains(group))
    if results.tasks(group):
        found.append(tasks(group))
    if group.reference is not None and len(group.entries) > 1:
        found.append(costs_to_reach(group, group.reference))
    found.append(learning_rates(group))
    return found


def losses(group: RunGroup) -> Table:
    """Return the table of losses, like Table 1."""
    reported, ranked = paper.results(group.moe), rankings(group)
    reference = group.reference
    columns = ["activation", "training loss", "validation loss", "perplexity"]
    if reference is not None:
        columns += [f"minus {reference.label}", "lower in"]
    columns += ["seeds", "rate"]
    of_paper = [
        (title, values)
        for title, values in (
            ("paper: training loss", reported.training_loss),
            ("paper: perplexity", reported.perplexity),
            ("paper: validation loss", reported.validation_loss),
        )
        if any(entry.activation in values for entry in group.main)
    ]
    rows = []
    for entry in group.entries:
        cells = [
            _spread(results.known(results.values(entry, results.training_loss)), 3),
            _spread(results.known(results.values(entry, results.validation_loss())), 3),
            _spread(results.known(results.values(entry, results.perplexity())), 2),
        ]
        if reference is not None:
            cells += _against(entry, group.reference_for(entry) or reference, ranked)
        cells += [Cell(str(len(entry.seeds))), Cell(_rate(entry))]
        for _, values in of_paper:
            value = values.get(entry.activation) if entry in group.main else None
            cells.append(Cell(NONE if value is None else f"{value:g}"))
        rows.append((entry.label, cells))
    readers = [results.training_loss, results.validation_loss(), results.perplexity()]
    bold = _mark_best(group, rows, readers)
    run = group.runs[0]
    notes = [
        f"Mean ± standard deviation over seeds. Training loss: mean over the last "
        f"{run.window_steps} of {run.steps} steps. Validation: mean over domains at the last step"
        f"{_evaluated(run)}; perplexity is exp of each seed's mean loss."
    ]
    notes += [bold] if bold else []
    if reference is not None:
        notes.append(
            f"Minus {reference.label}: difference of the final {group.ranked_by} loss to "
            f"{reference.label} on the seeds that both have, ± half of the simultaneous 95 % "
            "interval of the ranking on these seeds."
        )
        if not all(entry.plain for entry in group.entries):
            notes[-1] += (
                " A line with other options is compared with the reference that has the same "
                "options, if such a run exists."
            )
        if any(len(entry.seeds) == 1 for entry in group.entries):
            notes[-1] += " A single seed has no interval."
    if of_paper:
        notes.append(f"Paper ({reported.models}): {reported.results}.")
    return Table(
        "Losses, like Table 1",
        columns + [title for title, _ in of_paper],
        rows,
        notes,
        len(columns) if of_paper else None,
    )


def _evaluated(run: Run) -> str:
    """Say on how many tokens, equal for all runs: a source of error in addition to seeds."""
    training = run.config["training"]
    if not run.domains:
        return ""
    if training["eval_iters"] is None:
        return ", of whole sets"
    tokens = training["eval_iters"] * training["global_batch_size"] * training["seq_length"]
    return f", of at most {tokens:,} tokens of each, the same for all runs"


def domains(group: RunGroup) -> Table:
    """Return the table of perplexities by domain, like Table 2."""
    names = results.domains(group)
    names = [*names, MEAN] if len(names) > 1 else names
    rows = []
    for entry in group.entries:
        cells = []
        for name in names:
            cell = _spread(results.known(results.values(entry, results.perplexity(name))), 2)
            loss = results.known(results.values(entry, results.validation_loss(name)))
            cell.below = f"{loss.mean:.3f}" if loss else ""
            cells.append(cell)
        rows.append((entry.label, cells))
    bold = _mark_best(group, rows, [results.perplexity(name) for name in names])
    notes = [
        "Perplexity at the last step, mean ± standard deviation over seeds; below it the loss."
    ]
    return Table(
        "Perplexity by domain, like Table 2",
        ["activation", *names],
        rows,
        notes + [f"{bold} Each column is judged by itself."] * bool(bold),
    )


def tasks(group: RunGroup) -> Table:
    """Return the table of benchmark scores."""
    names = results.tasks(group)
    readers: list[Callable[[Run], float | None]] = [
        lambda run, name=name: run.tasks.get(name)  # type: ignore[misc]
        for name in names
    ]
    rows = [
        (
            entry.label,
            [_score(entry, name, read) for name, read in zip(names, readers, strict=True)],
        )
        for entry in group.entries
    ]
    bold = _mark_best(group, rows, readers, highest=True)
    notes = [
        "Percent at the last evaluation, by the LM Evaluation Harness; mean ± standard deviation "
        "over seeds. Below it the standard error that the choice of questions gives a run, where "
        "the runs have recorded it: all runs answer the same questions, so seeds do not reduce it."
    ]
    return Table("Benchmark tasks", ["activation", *names], rows, notes + [bold] * bool(bold))


def _score(entry: Entry, name: str, read: Reader) -> Cell:
    """Return a score with its spread over seeds, and the standard error over the questions."""
    cell = _spread(results.known(results.values(entry, read)), 1)
    errors = [run.task_errors.get(name) for run in entry.seeds.values()]
    known = [error for error in errors if error is not None]
    if cell.text != NONE and len(known) == len(errors):
        cell.below = f"± {math.hypot(*known) / math.sqrt(len(known)):.1f} of questions"
    return cell


def costs_to_reach(group: RunGroup, reference: Entry) -> Table:
    """Return the table of tokens, FLOPs and time after which the reference's loss is reached."""
    reported = paper.results(group.moe).reach
    with_paper = any(entry.activation in reported for entry in group.main)
    rows = []
    for entry in group.entries:
        target = group.reference_for(entry) or reference
        if entry is target:
            continue
        by_validation = results.reach(entry, target, validation=True)
        by_training = results.reach(entry, target, validation=False)
        cells = [
            *(_reach(by_validation, kind) for kind in ("tokens", "flops", "time")),
            _reach(by_training, "tokens"),
        ]
        if with_paper:
            value = reported.get(entry.activation) if entry in group.main else None
            cells.append(Cell(NONE if value is None else f"{value:.2f}"))
        rows.append((entry.label, cells))
    columns = ["activation", "tokens", "FLOPs", "time", "tokens, by training loss"]
    window = group.runs[0].window_steps
    return Table(
        f"Tokens, FLOPs and time to reach the final loss of {reference.label}",
        columns + ["paper: tokens, by training loss"] * with_paper,
        rows,
        [
            f"Share of the run of {reference.label} with the same seed after which the curve of "
            "validation loss is first at or below that run's final loss, linear between "
            "points; mean ± standard deviation over seeds. A run that ends above that loss does "
            "not reach it; where some seeds do not, the cell has the number of those that do and, "
            "below it, their mean, which favours the line.",
            "FLOPs: of matrix products, so nearly those of the tokens. Time: the same share of the "
            "wall time, of runs that belong to one comparison; it has the cost of the activation "
            f"on that machine, which also did other work. Training loss is the mean over the last "
            f"{window} steps and is noisier, because batches differ along the run.",
        ],
        len(columns) if with_paper else None,
    )


def _rate(entry: Entry) -> str:
    return f"{entry.lr:g}" + ("" if len(entry.tried) > 1 else ", untuned")


def _spread(value: SeedStatistics | None, digits: int) -> Cell:
    if value is None:
        return Cell(NONE)
    deviation = "" if value.deviation is None else f"± {value.deviation:.{digits}f}"
    return Cell(f"{value.mean:.{digits}f}", deviation)


def _against(entry: Entry, reference: Entry, ranked: list[Ranking]) -> list[Cell]:
    if entry is reference:
        return [Cell("0"), Cell(NONE)]
    found: Difference | None = results.difference(entry, reference, final_loss)
    if found is None:
        return [Cell(NONE), Cell(NONE)]
    ranking = ranking_of(ranked, entry, reference)
    half = f"± {ranking.fit.half_interval:.4f}" if ranking is not None else ""
    return [Cell(signed(found.mean, 4), half), Cell(f"{found.below} of {found.count}")]


def _reach(found: Reach | None, kind: Literal["tokens", "flops", "time"]) -> Cell:
    """Return a share: its mean if all seeds have it, else their number and the others' mean."""
    if found is None:
        return Cell(NONE)
    if not found.tokens:
        return Cell("not reached", below=f"in {found.seeds} seeds" if found.seeds > 1 else "")
    shares = list(getattr(found, kind).values())
    mean = seed_statistics(shares)
    if mean is None:
        return Cell(NONE)
    if found.always:
        cell = _spread(mean, 2)
        if len(shares) < found.seeds:
            cell.below = f"{len(shares)} of {found.seeds} seeds"
        return cell
    return Cell(f"{len(shares)} of {found.seeds} seeds", below=f"in these {mean.mean:.2f}")


def _mark_best(
    group: RunGroup,
    rows: Sequence[tuple[str, list[Cell]]],
    readers: Sequence[Reader],
    *,
    highest: bool = False,
) -> str:
    """Print bold, in each column, the lines that may be the best of the first ranking.

    Returns:
        What bold means; empty without a ranking.
    """
    cells = dict(rows)
    seeds = ""
    for column, read in enumerate(readers):
        for ranking in rankings(group, read, highest=highest)[:1]:
            seeds = ranking.seed_names
            for entry in ranking.bold:
                cells[entry.label][column].best = True
    which = "highest" if highest else "lowest"
    return (
        f"Bold: of the lines with {seeds}, the {which} on these seeds and those that "
        "cannot be distinguished from it; none if no two can be distinguished."
        if seeds
        else ""
    )
