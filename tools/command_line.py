"""What the tools' command lines share: numbers with a range, and an end on signals."""

from __future__ import annotations

import argparse
import math
import signal
import sys
from collections.abc import Callable


def whole(least: int) -> Callable[[str], int]:
    """A whole number that is at least ``least``."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"{text} must be a whole number, {least} or more")
        return value

    return parse


def number(
    *, above: float = -math.inf, least: float = -math.inf, most: float
) -> Callable[[str], float]:
    """A finite number above ``above``, at least ``least`` and at most ``most``."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and above < value and least <= value <= most):
            lower = f"above {above:g}" if above > -math.inf else f"at least {least:g}"
            raise argparse.ArgumentTypeError(f"{text} must be {lower} and at most {most:g}")
        return value

    return parse


def run(main: Callable[[], int]) -> None:
    """Run a program; SIGTERM and Ctrl-C end it as errors do, so that it cleans up.

    The exit status is the program's, or 128 and the signal's number, as a shell reports it.
    """
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
