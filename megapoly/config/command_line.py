"""Shared by the commands: the parser, options, numbers with a range, exit statuses."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

from megapoly.config.options import OPTIONS, nearest, short
from megapoly.config.ranges import LARGEST_COUNT, Range, whole_number
from megapoly.errors import MegapolyError, UnavailableError
from megapoly.platform.logs import discard_output
from megapoly.platform.stores import is_url

DTYPES = ("float32", "bfloat16", "float16")
TRUST_CODE = "--trust-remote-code"
NO_CODE_TO_TRUST = f"`{TRUST_CODE}` has no effect on a checkpoint, which has no code; leave it out"


class Parser(argparse.ArgumentParser):
    """A parser whose help is its command's docstring, and which names all that is wrong.

    Args:
        command: name after ``megapoly``.
        description: docstring of the command's module; help shows it with its line breaks.
        earlier: spellings that earlier scripts use, each with the flag that replaced it.
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
        self._problems: list[str] | None = None  # a list while arguments are read

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse all arguments; end the program if some are wrong, and name all that are."""
        arguments = self.current_spelling(sys.argv[1:] if args is None else args)
        options, rest = self.parse_all(arguments, self.unknown_flags(arguments), self.flags())
        if rest:
            self.error(f"unrecognized arguments: {' '.join(map(short, rest))}")
        return options

    def parse_all(
        self, arguments: Sequence[str], unknown: Sequence[str], flags: Sequence[str]
    ) -> tuple[argparse.Namespace, list[str]]:
        """Parse the arguments that the command has, and return the others.

        Ends the program with one message for all: unknown flags, each with the nearest of
        ``flags``, values out of range, and required arguments that are missing.
        """
        self._problems = [_unknown(unknown, flags)] if unknown else []
        options, rest = argparse.Namespace(), list[str]()
        try:
            options, rest = super().parse_known_args(arguments)
        except _Incomplete:
            pass
        finally:
            problems, self._problems = self._problems, None
        if problems:
            super().error("; ".join(problems))
        return options, rest

    def error(self, message: str) -> NoReturn:
        """End the program, or remember the message until all arguments are read."""
        if self._problems is None:
            super().error(message)
        self._problems.append(message)
        raise _Incomplete

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        return self._unless_wrong(lambda: super(Parser, self)._get_value(action, arg_string))

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if value is not _WRONG:
            self._unless_wrong(lambda: super(Parser, self)._check_value(action, value))

    def _unless_wrong(self, work: Callable[[], Any]) -> Any:
        """Return the result of ``work``; remember the problem if a value is wrong."""
        try:
            return work()
        except argparse.ArgumentError as error:
            if self._problems is None:
                raise
            self._problems.append(str(error))
            return _WRONG

    def current_spelling(self, arguments: Sequence[Any]) -> list[str]:
        """Return the arguments with earlier spellings of flags replaced by the current ones."""
        cut = (str(argument).partition("=") for argument in arguments)
        return [f"{self._earlier.get(flag, flag)}{equals}{value}" for flag, equals, value in cut]

    def unknown_flags(self, arguments: Sequence[str]) -> list[str]:
        """Return the flags among the arguments that the command does not have.

        argparse reports missing arguments first, and a misspelled flag is often one of them.
        """
        before_rest = arguments[: arguments.index("--")] if "--" in arguments else arguments
        flags = [each.partition("=")[0] for each in before_rest if _looks_like_a_flag(each)]
        return [flag for flag in flags if flag not in self._option_string_actions]

    def flags(self) -> list[str]:
        """Return all flags that help shows."""
        shown = (action for action in self._actions if action.help != argparse.SUPPRESS)
        return [flag for action in shown for flag in action.option_strings]


class _Incomplete(Exception):  # noqa: N818  (not an error of its own)
    """The parser cannot read on; its problems say why."""


_WRONG: Any = object()  # instead of a value that is wrong


def _unknown(unknown: Sequence[str], flags: Sequence[str]) -> str:
    """Return the message about unknown flags, with the nearest known flag of each."""
    hints = [f"{short(flag)} (the nearest is {nearest(short(flag), flags)})" for flag in unknown]
    return f"unknown {'options' if len(hints) > 1 else 'option'} {', '.join(hints)}"


def _looks_like_a_flag(argument: str) -> bool:
    """Return whether argparse reads an argument as a flag: not ``-1``, not ``-``, no spaces."""
    is_text = " " in argument or _is_number(argument) or argument == "-"
    return argument.startswith("-") and not is_text


def add_conversion_options(parser: argparse.ArgumentParser, *, output: str, report: str) -> None:
    """Add the options that both conversions have.

    Args:
        parser: the command's parser.
        output: placeholder of ``--output``.
        report: file that records the comparison.
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


def add_trust_option(parser: argparse.ArgumentParser) -> None:
    """Add the option without which code in a Hugging Face folder is not run."""
    parser.add_argument(
        TRUST_CODE,
        action="store_true",
        help="run code in a Hugging Face folder; without it the code is named and not run",
    )


def parse_with_overrides(
    parser: Parser, argv: Sequence[str] | None
) -> tuple[argparse.Namespace, list[str]]:
    """Split a command line into the command's options and overrides of the configuration.

    Returns:
        The options, and the arguments of the form ``--section.field value``.
    """
    arguments = parser.current_spelling(sys.argv[1:] if argv is None else argv)
    unknown = [flag for flag in parser.unknown_flags(arguments) if "." not in flag]
    flags = [*parser.flags(), *(f"--{key}" for key in OPTIONS if "." in key)]
    return parser.parse_all(arguments, unknown, flags)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def path_or_url(text: str) -> Path | str:
    """Return a path, or a URL as it is, whose slashes a path would join."""
    return text if is_url(text) else Path(text)


def at_least(least: int, most: int = LARGEST_COUNT) -> Callable[[str], int]:
    """Return a parser of whole numbers from ``least`` to ``most``."""

    def parse(text: str) -> int:
        value = whole_number(text, Range(least, most))
        if value is None:
            raise argparse.ArgumentTypeError(
                f"{short(text)} must be a whole number, {least} to {most}"
            )
        return value

    return parse


def number(
    *, above: float = -math.inf, least: float = -math.inf, most: float
) -> Callable[[str], float]:
    """Return a parser of finite numbers above ``above``, from ``least`` to ``most``."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and above < value and least <= value <= most):
            lower = f"above {above:g}" if above > -math.inf else f"at least {least:g}"
            raise argparse.ArgumentTypeError(f"{short(text)} must be {lower} and at most {most:g}")
        return value

    return parse


def check_can_write(option: str, file: Path) -> None:
    """Check before hours of work that their result can be written; make the file's folder.

    Raises:
        UnavailableError: it cannot.
    """
    existed = file.exists()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.open("a").close()
        if not existed:
            file.unlink()
    except OSError as error:
        raise UnavailableError(
            f"`{option}` ({file}) cannot be written: {error.strerror}"
        ) from error


def status_of(work: Callable[[], int]) -> int:
    """Run ``work`` and return its exit status; 2, with a message, for errors of users or files."""
    try:
        return work()
    except MegapolyError as error:
        print(error, file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of the output has ended
        discard_output()
        return 2
    except OSError as error:
        print(f"`{error.filename}`: {error.strerror or error}", file=sys.stderr)
        return 2
