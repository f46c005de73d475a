"""The columns of ``megapoly status``, and their plain text, for programs that split it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megapoly.training.run_status.health import duration
from megapoly.training.run_status.reading import Watched

UNKNOWN = "-"


@dataclass(frozen=True)
class Column:
    """A column of the table.

    Args:
        title: its heading.
        text: of a run.
        importance: columns with a higher one are left out first where there is no room.
        is_number: aligned to the right.
    """

    title: str
    text: Callable[[Watched], str]
    importance: int
    is_number: bool = True


COLUMNS = (
    Column("run", lambda run: str(run.folder), 0, is_number=False),
    Column("state", lambda run: run.health.state, 0, is_number=False),
    Column("step", lambda run: steps(run), 0),
    Column("loss", lambda run: number(run.status.loss, ".4f"), 1),
    Column("validation", lambda run: _validation(run), 4),
    Column("tokens/s", lambda run: number(run.status.tokens_per_second, ",.0f"), 3),
    Column("last step", lambda run: ago(run.age_s), 1),
    Column("ETA", lambda run: eta(run), 2),
    Column("saved", lambda run: _saved_step(run), 3),
    Column("spikes", lambda run: number(run.status.spikes, "d"), 6),
    Column("ranks", lambda run: number(run.status.world_size, "d"), 6),
    Column("host", lambda run: run.status.host or UNKNOWN, 5, is_number=False),
)


def plain_lines(runs: Sequence[Watched]) -> list[str]:
    """Return the table with all columns, as text for other programs, and the sentences below."""
    rows = [[column.title for column in COLUMNS]]
    rows += [[column.text(run).replace(" ", "_") or UNKNOWN for column in COLUMNS] for run in runs]
    rows[0] = [title.replace(" ", "_") for title in rows[0]]
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            f"{cell:>{width}}" if column.is_number else f"{cell:<{width}}"
            for cell, width, column in zip(row, widths, COLUMNS, strict=True)
        ).rstrip()
        for row in rows
    ]
    sentences = [f"{run.folder}: {run.health.sentence}" for run in runs if not run.health.is_well]
    return lines + sentences


def number(value: float | None, form: str, unit: str = "") -> str:
    """Return a number in a format, with a unit behind it; ``-`` if it is not known."""
    return UNKNOWN if value is None else f"{value:{form}}{unit}"


def steps(run: Watched) -> str:
    """Return the steps made and of the whole run: ``37/240``."""
    total = run.status.train_iters
    return f"{run.status.step}/{UNKNOWN if total is None else total}"


def ago(age_s: float | None) -> str:
    """Return how long ago something was."""
    return UNKNOWN if age_s is None else f"{duration(age_s)} ago"


def eta(run: Watched) -> str:
    """Return the time to the end of a run that trains."""
    eta_s = run.status.eta_s
    is_advancing = run.status.is_running and run.health.is_well
    return duration(eta_s) if eta_s is not None and is_advancing else UNKNOWN


def _validation(run: Watched) -> str:
    losses = run.status.validation
    loss = losses.get("mean", next(iter(losses.values()), None))
    return number(loss, ".4f")


def _saved_step(run: Watched) -> str:
    checkpoint = run.status.checkpoint
    return UNKNOWN if checkpoint is None else str(checkpoint.step)
