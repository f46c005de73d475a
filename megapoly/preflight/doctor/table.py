"""A table of the checks for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from megapoly.preflight.doctor.checks import Line
from megapoly.preflight.doctor.requirements import KNOWN_COMBINATIONS

_SHOWN = {
    "ok": "[green]ok[/]",
    "optional": "[yellow]missing, optional[/]",
    "wrong": "[red]wrong[/]",
}
# Of an output that is not a terminal, such as a container's log.
_WIDTH = 120


def print_lines(lines: Sequence[Line], commands: Sequence[str]) -> None:
    """Print the checks as a table, the remedy of each that is wrong, and a verdict.

    Args:
        lines: the checks.
        commands: sentences on which commands can run.
    """
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=_WIDTH)
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("part", no_wrap=True)
    table.add_column("status", no_wrap=True)
    table.add_column("found", overflow="fold", ratio=2)
    table.add_column("what for", overflow="fold", ratio=3)
    for line in lines:
        use = f"{line.use} ({line.remedy})" if _can_be_installed(line) else line.use
        table.add_row(line.part, _SHOWN[line.status], _plain(line.found), _plain(use))
    console.print(table)
    console.print()
    console.print(_plain(KNOWN_COMBINATIONS))
    for text in commands:
        console.print(_plain(text))
    wrong = [line for line in lines if line.status == "wrong"]
    for line in wrong:
        console.print(f"[red]{line.part}[/]: {_plain(line.remedy)}")
    verdict = "[red]Training cannot run here as it is.[/]" if wrong else "Training can run here."
    console.print(verdict)


def _can_be_installed(line: Line) -> bool:
    return line.status == "optional" and bool(line.remedy)


def _plain(text: str) -> str:
    """Return text whose square brackets rich prints as they are: 'megapoly[gpu]'."""
    return text.replace("[", r"\[")
