"""Tables of plain text."""

from __future__ import annotations

from dataclasses import dataclass, field

NONE = "–"


@dataclass
class Cell:
    """One cell.

    Args:
        text: content.
        spread: added after the text, smaller.
        below: second line, smaller.
        best: whether it is the best of its column.
        value: number by which it is ranked.
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
        title: caption.
        columns: headings; the first is for the row names.
        rows: name and cells of each.
        notes: sentences below the table.
        of_paper: index of the first column that is from the paper.
        is_text: whether cells are text and not numbers.
    """

    title: str
    columns: list[str]
    rows: list[tuple[str, list[Cell]]]
    notes: list[str] = field(default_factory=list)
    of_paper: int | None = None
    is_text: bool = False


def duration(seconds: float) -> str:
    """Format seconds as hours, minutes or seconds."""
    if seconds >= 3600:
        return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60)} min"
    return f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.0f} s"


def signed(value: float, digits: int) -> str:
    """Format a number with its sign, and a true minus."""
    return f"{value:+.{digits}f}".replace("-", "−")
