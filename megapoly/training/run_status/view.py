"""Runs in a terminal: one in detail, several as a table."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from rich.console import Console, Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from megapoly.training.run_status.columns import COLUMNS, UNKNOWN, Column, ago, eta, number, steps
from megapoly.training.run_status.health import duration
from megapoly.training.run_status.reading import Watched

_STYLES = {
    "starting": "cyan",
    "training": "green",
    "evaluating": "green",
    "saving": "green",
    "complete": "bold green",
    "stopped": "yellow",
    "unknown": "yellow",
    "failed": "bold red",
    "silent": "bold red",
    "dead": "bold red",
}
_BAR = 24  # characters


def show(runs: Sequence[Watched], console: Console) -> RenderableType:
    """Return what to print of runs.

    Args:
        runs: at least one.
        console: that prints it; its width decides on the columns.
    """
    if len(runs) == 1:
        return _detail(runs[0], console.width)
    ill = [run for run in runs if not run.health.is_well]
    notes = [Text(_shortened(run, 2 * console.width), style="red") for run in ill]
    return Group(_table(runs, console.width), *notes)


def _shortened(run: Watched, longest: int) -> str:
    """Return what is wrong with a run, in two lines; in detail it is shown whole."""
    # Lines end at words, so that two of them hold somewhat less.
    return textwrap.shorten(
        f"{run.folder}: {run.health.sentence}", longest - 12, placeholder=" ..."
    )


def _table(runs: Sequence[Watched], width: int) -> Table:
    """Return the table with the columns for which there is room."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    columns = _fitting(runs, width)
    for column in columns:
        table.add_column(
            column.title,
            justify="right" if column.is_number else "left",
            no_wrap=True,
            overflow="ellipsis",
        )
    for run in runs:
        table.add_row(*(_cell(column, run) for column in columns))
    return table


def _fitting(runs: Sequence[Watched], width: int) -> list[Column]:
    needed = {
        column.title: 2 + max(len(column.title), *(len(column.text(run)) for run in runs))
        for column in COLUMNS
    }
    kept = list(COLUMNS)
    while len(kept) > 3 and sum(needed[column.title] for column in kept) - 2 > width:
        kept.remove(max(kept, key=lambda column: column.importance))
    return kept


def _cell(column: Column, run: Watched) -> Text:
    return Text(column.text(run), style=_style(run) if column.title == "state" else "")


def _style(run: Watched) -> str:
    return _STYLES.get(run.health.state, "")


def _detail(run: Watched, width: int) -> RenderableType:
    """Return a run in two columns: what it is, and its value."""
    status = run.status
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold")
    grid.add_column(overflow="fold", max_width=max(20, width - 14))
    state, sentence = run.health.state, run.health.sentence
    rest = sentence.removeprefix(state) if sentence.startswith(state) else f": {sentence}"
    grid.add_row("run", Text(str(run.folder)))
    grid.add_row("state", Text.assemble(Text(state, style=_style(run)), rest))
    if status.train_iters:
        bar = ProgressBar(total=status.train_iters, completed=status.step, width=_BAR)
        share = f"{steps(run)}, {status.step / status.train_iters:.1%}{_left(run)}"
        line = Table.grid(padding=(0, 1))
        line.add_row(bar, Text(share))
        grid.add_row("step", line)
    for title, text in _details(run):
        if text:
            grid.add_row(title, Text(text))
    return grid


def _details(run: Watched) -> list[tuple[str, str]]:
    status = run.status
    parts = [
        _named("train", status.loss, ".4f"),
        *(_named(name, loss, ".4f") for name, loss in status.validation.items()),
    ]
    speed = [
        number(status.tokens_per_second, ",.0f", " tokens/s"),
        number(status.step_time_s, ".3g", " s a step"),
        number(None if status.mfu is None else 100 * status.mfu, ".1f", " % MFU"),
    ]
    optimizer = [
        _named("grad norm", status.grad_norm, ".3f"),
        _named("lr", status.learning_rate, ".2e"),
        _named("spikes", status.spikes, "d"),
        _named("skipped", status.skipped_steps, "d"),
    ]
    job = [
        "" if status.pid is None else f"process {status.pid} on {status.host}",
        number(status.world_size, "d", " ranks" if status.world_size != 1 else " rank"),
        status.layout or "",
        *(f"{name} {value}" for name, value in status.job.items()),
    ]
    return [
        ("loss", _joined(parts)),
        ("tasks", _joined([_named(name, score, ".1f") for name, score in status.tasks.items()])),
        ("speed", _joined(speed)),
        ("tokens", number(status.consumed_tokens, ",d")),
        ("optimizer", _joined(optimizer)),
        ("checkpoint", _checkpoint(run)),
        ("job", _joined(job)),
    ]


def _joined(parts: Sequence[str]) -> str:
    return ", ".join(part for part in parts if part and part != UNKNOWN)


def _named(name: str, value: float | None, form: str) -> str:
    return "" if value is None else f"{name} {value:{form}}"


def _left(run: Watched) -> str:
    left = eta(run)
    return "" if left == UNKNOWN else f", {left} left"


def _checkpoint(run: Watched) -> str:
    """Return the newest checkpoint, and what a crash would cost."""
    status = run.status
    saved = status.checkpoint
    step = 0 if saved is None else saved.step
    nothing = "none yet" if status.is_running else "none"
    name = nothing if saved is None else saved.path.rpartition("/")[2]
    if saved is not None and saved.time is not None:
        name += f", saved {ago(run.now - saved.time)}"
    at_risk = status.step - step
    if not status.is_running or at_risk <= 0:
        return name
    cost = "" if status.step_time_s is None else f", {duration(at_risk * status.step_time_s)}"
    return f"{name}; a crash now would cost {at_risk} steps{cost}"
