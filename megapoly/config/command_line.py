"""Parts that the commands' parsers share: options, numbers with a range, errors."""

from __future__ import annotations

import argparse
import difflib
import math
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

from megapoly.errors import MegapolyError

DTYPES = ("float32", "bfloat16", "float16")


class Parser(argparse.ArgumentParser):
    """A parser that describes a command by its module's docstring and knows its nearest flag.

    Args:
        command: name after ``megapoly``.
        description: docstring of the command's module; help shows it as it is laid out there.
        earlier: spellings that earlier scripts use, by the flag that replaced each.
        **kwargs: of :class:`argparse.ArgumentParser`.
    """

    def __init__(
        self,
        command: str,
        description: str | None,
        *,
        earlier: Mapping[str, str] = MappingProxyType({}),
        **kwargs: Any,
    ) -> None:
        super().__init__(
            prog=f"megapoly {command}",
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            **kwargs,
        )
        self._earlier = earlier

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse all arguments; an unknown flag ends the program and names the nearest one."""
        options, rest = self.parse_known_args(args, namespace)
        if rest:
            self.refuse(rest)
        return options

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse the arguments that the parser knows, in their present or their earlier spelling."""
        given = sys.argv[1:] if args is None else args
        return super().parse_known_args([self._present(str(each)) for each in given], namespace)

    def _present(self, argument: str) -> str:
        flag, equals, value = argument.partition("=")
        return f"{self._earlier.get(flag, flag)}{equals}{value}"

    def refuse(self, arguments: Sequence[str]) -> NoReturn:
        """End the program because of arguments that the command does not have."""
        flags = [flag for flag in arguments if flag.startswith("-")]
        if not flags:
            self.error(f"unexpected arguments: {' '.join(arguments)}")
        own = [flag for action in self._actions for flag in action.option_strings]
        named = [flag.partition("=")[0] for flag in flags]
        hints = [f"{flag} (the nearest is {_nearest(flag, own)})" for flag in named]
        self.error(f"unknown {'options' if len(hints) > 1 else 'option'} {', '.join(hints)}")


def _nearest(flag: str, flags: Iterable[str]) -> str:
    return difflib.get_close_matches(flag.replace("_", "-"), list(flags), n=1, cutoff=0.0)[0]


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


def parse_with_overrides(
    parser: Parser, argv: Sequence[str] | None
) -> tuple[argparse.Namespace, list[str]]:
    """Split a command line into the command's options and overrides of the configuration.

    Returns:
        The options, and the arguments of the form ``--section.field value``.
    """
    options, overrides = parser.parse_known_args(argv)
    unknown = [
        each
        for each in overrides
        if each.startswith("-") and "." not in each.partition("=")[0] and not _is_number(each)
    ]
    if unknown:
        parser.refuse(unknown)
    return options, overrides


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


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
