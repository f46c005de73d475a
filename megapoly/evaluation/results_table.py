"""Print tables like the paper's, with the paper's models next to this one."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from megapoly.evaluation.paper_tables import PAPER_TABLES, PaperTable
from megapoly.evaluation.results import TaskResults
from megapoly.evaluation.tasks import GROUPS

_NONE = "-"


def show_results(results: TaskResults, model: str, console: Console) -> None:
    """Print the requested tables of the paper, then every task; with standard errors and chance.

    Args:
        results: the results.
        model: name of this model's row.
        console: console to print to.
    """
    for name in results.selection.tables:
        console.print(_paper_table(results, name, model))
        console.print()
    console.print(_all_tasks(results, model))
    for warning in results.warnings:
        times = f" ({warning.count} times)" if warning.count > 1 else ""
        _line(console, f"warning of the harness: {warning.text}{times}")


def _line(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def _paper_table(results: TaskResults, name: str, model: str) -> Table:
    paper = PAPER_TABLES[name]
    table = Table(
        title=f"Accuracy (%), as in the paper's Table {paper.number}",
        caption=_caption(results, name, paper),
        box=SIMPLE_HEAD,
        padding=0,  # ten columns of figures and the names must fit 80 characters
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("", overflow="fold", min_width=16)
    for column in (*paper.columns, "Avg."):
        table.add_column(column, justify="right", no_wrap=True)
    found = [results.find(task) for task in GROUPS[name]]
    names = GROUPS[name]
    figures = [_number(result.score if result else None) for result in found]
    errors = [_number(result.stderr if result else None) for result in found]
    chances = [_number(result.chance_score if result else None) for result in found]
    table.add_row(escape(model), *figures, _number(results.average(names)), style="bold")
    table.add_row("standard error", *errors, _number(results.average_stderr(names)))
    table.add_row("chance", *chances, _number(results.average_chance(names)), end_section=True)
    for activation, accuracies in paper.rows.items():
        cells = (f"{accuracy:.2f}" for accuracy in (*accuracies, paper.averages[activation]))
        table.add_row(f"paper: {activation}", *cells, style="dim")
    return table


def _caption(results: TaskResults, name: str, paper: PaperTable) -> str:
    lines = [f"paper: the full-size models ({paper.models}), copied from the paper"]
    if results.limit is not None:
        lines.append(_limit_text(results))
    found = [result for task in GROUPS[name] if (result := results.find(task))]
    lines += [
        f"{result.task.column}: {result.split} split, without data of the {result.task.split} split"
        for result in found
        if result.split != result.task.split
    ]
    skipped = [each.task.column for each in results.skipped if each.task.name in GROUPS[name]]
    if skipped:
        lines.append(f"no data, so no average: {', '.join(skipped)}")
    return escape("\n".join(lines))


def _limit_text(results: TaskResults) -> str:
    first = "first question" if results.limit == 1 else f"first {results.limit} questions"
    each = "each task, of each subject of MMLU" if _has_subjects(results) else "each task"
    return f"this model: only the {first} of {each}"


def _has_subjects(results: TaskResults) -> bool:
    return any(result.subtasks for result in results.tasks)


def _all_tasks(results: TaskResults, model: str) -> Table:
    table = Table(
        title=f"All tasks: {escape(model)}",
        caption=None if results.limit is None else escape(_limit_text(results)),
        box=SIMPLE_HEAD,
        padding=0,  # eight columns and the longest name must fit 80 characters
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("task", overflow="fold")
    table.add_column("split")
    for column in ("shots", "asked"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("metric", overflow="fold")
    for column in ("score", "error", "chance"):
        table.add_column(column, justify="right", no_wrap=True)
    for result in results.tasks:
        table.add_row(
            escape(result.task.name),
            result.split,
            str(result.num_fewshot),
            f"{result.num_questions:,}",
            escape(result.metric),
            _number(result.score),
            _number(result.stderr, "±"),
            _number(result.chance_score),
        )
    for skipped in results.skipped:
        table.add_row(escape(skipped.task.name), "no data", style="dim")
    average = results.average()
    if average is not None and len(results.tasks) > 1:
        table.add_section()
        error, chance = results.average_stderr(), results.average_chance()
        table.add_row("mean", *[""] * 4, _number(average), _number(error, "±"), _number(chance))
    return table


def _number(value: float | None, sign: str = "") -> str:
    return _NONE if value is None else f"{sign}{value:.2f}"
