"""Tables of the results of a group, as plain text."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from megapoly.config.data_sources import MEAN
from megapoly.study.report import paper, results
from megapoly.study.report.cells import NONE, Cell, Table, signed
from megapoly.study.report.groups import Entry, RunGroup, final_loss
from megapoly.study.report.results import Difference, Reach
from megapoly.study.report.run_tables import learning_rates
from megapoly.study.report.runs import Run
from megapoly.study.report.statistics import SeedStatistics


def tables(group: RunGroup) -> list[Table]:
    """Return the tables for which the group has the runs."""
    found = [losses(group)]
    if group.runs[0].domains:
        found.append(domains(group))
    if results.tasks(group):
        found.append(tasks(group))
    if group.reference is not None and len(group.entries) > 1:
        found.append(tokens_to_reach(group, group.reference))
    found.append(learning_rates(group))
    return found


def losses(group: RunGroup) -> Table:
    """Return the table of losses, like Table 1."""
    reported = paper.results(group.moe)
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
            cells += _against(entry, group.reference_for(entry) or reference)
        cells += [Cell(str(len(entry.seeds))), Cell(f"{entry.lr:g}")]
        for _, values in of_paper:
            value = values.get(entry.activation) if entry in group.main else None
            cells.append(Cell(NONE if value is None else f"{value:g}"))
        rows.append((entry.label, cells))
    _mark_best(rows, range(3))
    run = group.runs[0]
    notes = [
        f"Mean ± standard deviation over seeds. Training loss: mean over the last "
        f"{run.window_steps} of {run.steps} steps. Validation: mean over domains at the last step"
        f"{_evaluated(run)}; perplexity is exp of each seed's mean loss."
    ]
    if reference is not None:
        notes.append(
            f"Minus {reference.label}: difference of the final "
            f"{group.ranked_by} loss to {reference.label} "
            "with the same seed, mean ± standard error."
        )
        if not all(entry.plain for entry in group.entries):
            notes[-1] += (
                " A line with other options is compared with the reference that has the same "
                "options, if such a run exists."
            )
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
    _mark_best(rows, range(len(names)))
    return Table(
        "Perplexity by domain, like Table 2",
        ["activation", *names],
        rows,
        ["Perplexity at the last step, mean ± standard deviation over seeds; below it the loss."],
    )


def tasks(group: RunGroup) -> Table:
    """Return the table of benchmark scores."""
    names = results.tasks(group)
    readers: list[Callable[[Run], float | None]] = [
        lambda run, name=name: run.tasks.get(name)  # type: ignore[misc]
        for name in names
    ]
    rows = [
        (entry.label, [_spread(results.known(results.values(entry, r)), 1) for r in readers])
        for entry in group.entries
    ]
    _mark_best(rows, range(len(names)), highest=True)
    return Table(
        "Benchmark tasks",
        ["activation", *names],
        rows,
        ["Percent at the last evaluation, by the LM Evaluation Harness; mean ± deviation."],
    )


def tokens_to_reach(group: RunGroup, reference: Entry) -> Table:
    """Return the table of the share of the run after which the reference's loss is reached."""
    reported = paper.results(group.moe).reach
    with_paper = any(entry.activation in reported for entry in group.main)
    rows = []
    for entry in group.entries:
        target = group.reference_for(entry) or reference
        if entry is target:
            continue
        cells = [
            _reach(results.reach(entry, target, validation=validation))
            for validation in (True, False)
        ]
        if with_paper:
            value = reported.get(entry.activation) if entry in group.main else None
            cells.append(Cell(NONE if value is None else f"{value:.2f}"))
        rows.append((entry.label, cells))
    columns = ["activation", "by validation loss", "by training loss"]
    window = group.runs[0].window_steps
    return Table(
        f"Tokens to reach the final loss of {reference.label}",
        columns + ["paper: training loss"] * with_paper,
        rows,
        [
            f"Share of the run's tokens after which the curve is first at or below the final loss "
            f"of {reference.label} with the same seed, linear between points; mean ± standard "
            f"deviation over the seeds that reach it. A run that ends above that loss does not "
            f"reach it. Training loss is the mean over the last {window} steps and is noisier, "
            f"because batches differ along the run."
        ],
        len(columns) if with_paper else None,
    )


def _spread(value: SeedStatistics | None, digits: int) -> Cell:
    if value is None:
        return Cell(NONE)
    deviation = "" if value.deviation is None else f"± {value.deviation:.{digits}f}"
    return Cell(f"{value.mean:.{digits}f}", deviation, value=value.mean)


def _against(entry: Entry, reference: Entry) -> list[Cell]:
    if entry is reference:
        return [Cell("0"), Cell(NONE)]
    found: Difference | None = results.difference(entry, reference, final_loss)
    if found is None:
        return [Cell(NONE), Cell(NONE)]
    error = found.spread.error
    return [
        Cell(signed(found.spread.mean, 4), "" if error is None else f"± {error:.4f}"),
        Cell(f"{found.below} of {found.spread.count}"),
    ]


def _reach(found: Reach | None) -> Cell:
    if found is None:
        return Cell(NONE)
    spread = found.spread
    if spread is None:
        return Cell("not reached", below=f"in {found.seeds} seeds" if found.seeds > 1 else "")
    cell = _spread(spread, 2)
    if len(found.shares) < found.seeds:
        cell.below = f"{len(found.shares)} of {found.seeds} seeds"
    return cell


def _mark_best(
    rows: Sequence[tuple[str, list[Cell]]], columns: Sequence[int], *, highest: bool = False
) -> None:
    for column in columns:
        values = [c.value for _, cells in rows if (c := cells[column]).value is not None]
        if len(values) > 1:
            best = max(values) if highest else min(values)
            for _, cells in rows:
                cells[column].best = cells[column].value == best
