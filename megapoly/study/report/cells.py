"""Tables of plain text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

NONE = "–"


@dataclass
class Cell:
    """One cell.

    Args:
        text: content.
        spread: added after the text, smaller.
        below: second line, smaller.
        best: whether it may be the best of its column; shown bold.
    """

    text: str
    spread: str = ""
    below: str = ""
    best: bool = False


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


def listed(items: Sequence[str]) -> str:
    """Join items with commas, and "and" before the last."""
    return " and ".join([", ".join(items[:-1]), items[-1]] if len(items) > 1 else items)
