"""The tables of comparable runs, in a terminal."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table as Shown

from megapoly.report import content as contents
from megapoly.report.answer import answer
from megapoly.report.cells import Cell, Table
from megapoly.report.grouping import group_runs
from megapoly.report.tables import tables


def show_tables(folder: Path, reference: str, console: Console) -> None:
    """Show every table of the complete runs in a folder, and what they say.

    Args:
        folder: with runs, at any depth.
        reference: activation to compare with.
        console: where.
    """
    runs = [run for run in contents.read([folder]).runs if run.complete]
    for group in group_runs(runs, reference):
        for table in tables(group):
            console.print(_shown(table))
            for note in table.notes:
                console.print(note, style="dim", highlight=False, markup=False)
        for sentence in answer(group):
            console.print(sentence, highlight=False, markup=False)


def _shown(table: Table) -> Shown:
    shown = Shown(title=table.title, title_justify="left", box=None, pad_edge=False)
    shown.add_column(table.columns[0], no_wrap=True)
    for name in table.columns[1:]:
        shown.add_column(name, justify="right")
    for name, cells in table.rows:
        shown.add_row(name, *(_text(cell) for cell in cells))
    return shown


def _text(cell: Cell) -> str:
    text = f"[bold]{cell.text}[/]" if cell.best else cell.text
    below = f"\n[dim]{cell.below}[/]" if cell.below else ""
    return f"{text} {cell.spread}".rstrip() + below
