"""Tables of plain text."""

from __future__ import annotations

from dataclasses import dataclass, field

NONE = "–"


@dataclass
class Cell:
    """One cell.

    Args:
        text: what it says.
        spread: behind it, smaller.
        below: a second line, smaller.
        best: whether it is the best of its column.
        value: that it is ranked by.
    """

    text: str
    spread: str = ""
    below: str = ""
    best: bool = False
    value: float | None = None


@dataclass
class Table:
    """A table.

    Args:
        title: above it.
        columns: the headings, the first of the names of the rows.
        rows: a name and cells each.
        notes: sentences below it.
        of_paper: columns from this one on are the paper's.
    """

    title: str
    columns: list[str]
    rows: list[tuple[str, list[Cell]]]
    notes: list[str] = field(default_factory=list)
    of_paper: int | None = None


def duration(seconds: float) -> str:
    """Hours, minutes or seconds."""
    if seconds >= 3600:
        return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60)} min"
    return f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.0f} s"


def signed(value: float, digits: int) -> str:
    """With its sign, minus as such."""
    return f"{value:+.{digits}f}".replace("-", "−")
