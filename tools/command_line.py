"""What the tools' command lines share: options, numbers with a range, an end on signals."""

from __future__ import annotations

import argparse
import logging
import math
import os
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from megapoly.errors import MegapolyError

DTYPES = ("float32", "bfloat16", "float16")


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """A parser whose help begins with a module's docstring, as it is laid out there."""
    return argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def add_conversion_options(parser: argparse.ArgumentParser, *, output: str, report: str) -> None:
    """Options of both conversions.

    Args:
        parser: to add to.
        output: placeholder of ``--output``.
        report: file that the comparison is recorded in.
    """
    add = parser.add_argument
    add("--output", required=True, type=Path, metavar=output, help="folder to make")
    add("--overwrite", action="store_true", help=f"replace {output} if it exists")
    add("--skip-parity", action="store_true", help=f"do not compare; recorded in {report}")
    add(
        "--tolerance",
        type=number(above=0.0, most=1.0),
        metavar="X",
        help="largest difference of a logit, relative to the largest at its position if that is "
        "above 1 (1e-5)",
    )


def quieten() -> None:
    """Show errors alone of what the engine and libraries log and warn."""
    logging.basicConfig(level=logging.ERROR, format="%(message)s")
    warnings.filterwarnings("ignore")


def parse_with_overrides(
    parser: argparse.ArgumentParser, argv: Sequence[str]
) -> tuple[argparse.Namespace, list[str]]:
    """A program's options, and the words of the configuration's, `--section.field value`."""
    options, words = parser.parse_known_args(argv)
    unknown = [word for word in words if word.startswith("-") and "." not in word]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    return options, words


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


def status_of(work: Callable[[], int]) -> int:
    """The status of a program's work; 2, with a message, for what a user or a file causes."""
    try:
        return work()
    except MegapolyError as error:
        print(error, file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 2
    except OSError as error:
        print(f"`{error.filename}`: {error.strerror or error}", file=sys.stderr)
        return 2


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
