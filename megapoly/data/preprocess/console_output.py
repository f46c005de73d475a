"""Output that all commands of the preprocessor share: plain lines and a bar of bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn


@contextmanager
def byte_progress(
    description: str, total_bytes: int, console: Console | None = None
) -> Iterator[Callable[[int], None]]:
    """Show a bar on a terminal; yield a function to call with the number of bytes processed.

    Args:
        description: text before the bar.
        total_bytes: bytes when complete.
        console: output; None: the error output.
    """
    console = console or Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    with Progress(
        *columns,
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as bar:
        task = bar.add_task(escape(description), total=total_bytes)
        yield lambda size: bar.advance(task, size)


def print_plain(console: Console, text: str) -> None:
    """Print a line without markup, colours or wrapping: paths may contain brackets."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)
