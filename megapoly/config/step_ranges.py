"""Ranges of steps, as ``training.skip_batches`` has them: ``[1200-1210, 1300]``."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from megapoly.config.ranges import LARGEST_COUNT, Range, whole_number

STEPS = Range(1, LARGEST_COUNT)
_ENDS = re.compile(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?")


def step_range(entry: int | str) -> range | None:
    """Return the steps of an entry, a step or ``FIRST-LAST``; None if it is neither."""
    match = _ENDS.fullmatch(str(entry))
    if match is None:
        return None
    first = whole_number(match[1], STEPS)
    last = first if match[2] is None else whole_number(match[2], STEPS)
    if first is None or last is None or last < first:
        return None
    return range(first, last + 1)


def step_ranges(entries: Iterable[int | str] | None) -> list[range]:
    """Return the steps of valid entries, joined and in order.

    Args:
        entries: of ``training.skip_batches``; None: no steps.
    """
    found = [step_range(entry) for entry in entries or ()]
    return joined(steps for steps in found if steps is not None)


def joined(ranges: Iterable[range]) -> list[range]:
    """Return the same steps in order, as few ranges as possible."""
    result: list[range] = []
    for steps in sorted(ranges, key=lambda each: each.start):
        if result and steps.start <= result[-1].stop:
            result[-1] = range(result[-1].start, max(result[-1].stop, steps.stop))
        else:
            result.append(steps)
    return result


def until(ranges: Iterable[range], step: int) -> list[range]:
    """Return the part of ranges that ends with a step."""
    return [range(each.start, min(each.stop, step + 1)) for each in ranges if each.start <= step]


def contain(ranges: Sequence[range], others: Iterable[range]) -> bool:
    """Return whether ranges, joined, have every step of others."""
    return all(
        any(each.start <= other.start and other.stop <= each.stop for each in ranges)
        for other in others
    )


def text_of_steps(ranges: Iterable[range]) -> str:
    """Return ranges as the command line takes them, without brackets: ``1200-1210, 1300``."""
    return ", ".join(
        str(each.start) if len(each) == 1 else f"{each.start}-{each.stop - 1}" for each in ranges
    )
