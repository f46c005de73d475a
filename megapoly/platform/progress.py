"""Progress bars."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

# Called with the number of finished items and the total.
OnProgress = Callable[[int, int], None]


@contextmanager
def counting_bar(
    description: str, console: Console, *, until_first: str | None = None
) -> Iterator[OnProgress]:
    """Show how many items are finished; yield the function to call with each count.

    Args:
        description: text before the bar.
        console: where to show it.
        until_first: text until the first call; None for ``description``.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task(until_first or description, total=None)

        def on_progress(done: int, total: int) -> None:
            progress.update(bar, completed=done, total=total, description=description)

        yield on_progress


@contextmanager
def bytes_bar(
    description: str, total: int, console: Console, *, transient: bool = False
) -> Iterator[Callable[[int], None]]:
    """Show how many bytes are finished; yield the function to call with each part's bytes.

    Args:
        description: text before the bar.
        total: bytes in total.
        console: where to show it.
        transient: remove the bar at the end, and show none if the output is not a terminal.
    """
    if transient and not console.is_terminal:
        yield lambda num_bytes: None  # rich would leave an empty line
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=transient) as progress:
        bar = progress.add_task(escape(description), total=total)
        yield lambda num_bytes: progress.advance(bar, num_bytes)
