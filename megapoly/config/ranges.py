"""Ranges of numbers, and whole numbers as a command line has them."""

from __future__ import annotations

import re
from dataclasses import dataclass

LARGEST_COUNT = 2**31 - 1  # torch, the engine and the progress bar count in 32 bits
LARGEST_WORLD_SIZE = 2**20
MOST_PROCESSES = 1024  # on one host
SEEDS_BELOW = 2**32  # numpy's RandomState takes 32 bits
_WHOLE_NUMBER = re.compile(r"[-+]?(?:0|[1-9][0-9_]{0,30})")


@dataclass(frozen=True)
class Range:
    """The numbers from ``least`` to ``most``.

    Args:
        least: smallest number, or what all are above.
        most: largest number, or what all are below.
        open_below: whether ``least`` is not in the range.
        open_above: whether ``most`` is not in the range.
    """

    least: float
    most: float
    open_below: bool = False
    open_above: bool = False

    def __contains__(self, value: float) -> bool:
        is_above = self.least < value if self.open_below else self.least <= value
        return is_above and (value < self.most if self.open_above else value <= self.most)

    def __str__(self) -> str:
        lower = f"{'above' if self.open_below else 'at least'} {_plain(self.least)}"
        return f"{lower} and {'below' if self.open_above else 'at most'} {_plain(self.most)}"


def _plain(bound: float) -> str:
    return f"{bound:g}" if isinstance(bound, float) else str(bound)


def whole_number(text: str, range_: Range) -> int | None:
    """Return the whole number that text is in decimal digits; None if not in the range.

    ``010`` is none: in YAML and in C it is eight.
    """
    value = int(text) if _WHOLE_NUMBER.fullmatch(text.strip()) else None
    return value if value is not None and value in range_ else None
