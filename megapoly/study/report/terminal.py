"""Tables of a report in a terminal."""

from __future__ import annotations

from pathlib import Path

import rich.box
import rich.table
from rich.console import Console, Group
from rich.text import Text

from megapoly.study.report.answer import answer
from megapoly.study.report.cells import Cell, Table
from megapoly.study.report.content import read
from megapoly.study.report.grouping import group_runs
from megapoly.study.report.tables import tables


def show_tables(folder: Path, reference: str, console: Console) -> None:
    """Print the tables and the answer of the complete runs of a folder.

    Args:
        folder: of runs.
        reference: activation that the others are compared with.
        console: to print to.

    Raises:
        MegapolyError: as :func:`megapoly.study.report.content.read`.
    """
    for group in group_runs(read([folder]).runs, reference):
        for table in tables(group):
            console.print(Group("", _shown(table), *table.notes), highlight=False, markup=False)
        console.print(Group("", *answer(group)), highlight=False, markup=False)


def _shown(table: Table) -> rich.table.Table:
    """Return a table with names at the left, numbers at the right and the best ones bold."""
    shown = rich.table.Table(title=table.title, title_justify="left", box=rich.box.SIMPLE_HEAD)
    for index, column in enumerate(table.columns):
        shown.add_column(column, justify="right" if index else "left")
    for name, cells in table.rows:
        shown.add_row(name, *map(_text, cells))
    return shown


def _text(cell: Cell) -> Text:
    lines = [f"{cell.text} {cell.spread}".rstrip(), *([cell.below] if cell.below else [])]
    return Text("\n".join(lines), style="bold" if cell.best else "")
