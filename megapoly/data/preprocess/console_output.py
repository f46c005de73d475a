"""Plain lines of output, which all commands of the preprocessor share."""

from __future__ import annotations

from rich.console import Console


def print_plain(console: Console, text: str) -> None:
    """Print a line without markup, colours or wrapping: paths may contain brackets."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)
