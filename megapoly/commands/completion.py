"""Print a completion script: commands, their options, recipes and fields of the configuration.

    megapoly completion bash > ~/.local/share/bash-completion/completions/megapoly
    megapoly completion zsh > ~/.zfunc/_megapoly  # any folder of $fpath

In bash, `eval "$(megapoly completion bash)"` enables it in the current shell only.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from megapoly.commands import COMMANDS, benchmark, module_of, preprocess
from megapoly.config.command_line import Parser
from megapoly.config.options import OPTIONS
from megapoly.config.recipes import recipe_names

SHELLS = ("bash", "zsh", "tcsh")


def main(argv: Sequence[str]) -> int:
    """Print the script."""
    shell = build_parser().parse_args(argv).shell
    import shtab

    print(shtab.complete(whole_parser(), shell=shell))
    return 0


def build_parser() -> Parser:
    """Return the command's parser."""
    parser = Parser("completion", __doc__)
    parser.add_argument("shell", choices=SHELLS, help="shell to complete in")
    return parser


def whole_parser() -> argparse.ArgumentParser:
    """Return one parser of all commands, each with its options."""
    whole = argparse.ArgumentParser(prog="megapoly")
    whole.add_argument("--version", action="store_true", help="print the version")
    commands = whole.add_subparsers()
    for name, command in COMMANDS.items():
        parser = commands.add_parser(name, help=command.summary, add_help=False)
        if name == "benchmark":
            _add_commands(parser, {each: _benchmark(each) for each in benchmark.BENCHMARKS})
            continue
        _copy(module_of(name).build_parser(), parser)
        if command.takes_overrides:
            _add_fields(parser)
        if name == "preprocess":
            _add_commands(parser, {each: _preprocess(each) for each in preprocess.SUBCOMMANDS})
    return whole


def _benchmark(name: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = benchmark.module_of(name).build_parser()
    return parser


def _preprocess(name: str) -> argparse.ArgumentParser:
    return preprocess.subcommand_parser(name)


def _add_commands(
    parser: argparse.ArgumentParser, parsers: dict[str, argparse.ArgumentParser]
) -> None:
    commands = parser.add_subparsers()
    for name, each in parsers.items():
        _copy(each, commands.add_parser(name, help=each.prog, add_help=False))


def _copy(source: argparse.ArgumentParser, target: argparse.ArgumentParser) -> None:
    """Copy the options that help shows, without the fields of the configuration."""
    for action in source._actions:
        flags = [flag.removeprefix("--") for flag in action.option_strings]
        if action.help != argparse.SUPPRESS and not OPTIONS.keys() & flags:
            if "config" in flags:
                action.choices = recipe_names()
            target._add_action(action)


def _add_fields(target: argparse.ArgumentParser) -> None:
    for key, option in OPTIONS.items():
        target.add_argument(f"--{key}", choices=option.choices, help=option.description)
