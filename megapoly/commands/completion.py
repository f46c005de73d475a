"""Print a completion script: commands, their options, recipes and fields of the configuration.

    eval "$(megapoly completion bash)"            # bash, now; in ~/.bashrc, always
    megapoly completion zsh > ~/.zfunc/_megapoly  # zsh, in a folder of $fpath

Needs the package shtab.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence

from megapoly.commands import COMMANDS, module_of
from megapoly.config.command_line import Parser

SHELLS = ("bash", "zsh", "tcsh")


def main(argv: Sequence[str]) -> int:
    """Print the script; 2 if shtab is missing."""
    shell = build_parser().parse_args(argv).shell
    if importlib.util.find_spec("shtab") is None:
        print("`megapoly completion` needs shtab: `pip install shtab`", file=sys.stderr)
        return 2
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
    commands = whole.add_subparsers()
    for name, command in COMMANDS.items():
        parser = commands.add_parser(name, help=command.summary, add_help=False)
        build = getattr(module_of(name), "build_parser", None)
        if build is not None:
            _copy_options(build(), parser)
    return whole


def _copy_options(source: argparse.ArgumentParser, target: argparse.ArgumentParser) -> None:
    for action in source._actions:
        if action.help != argparse.SUPPRESS:
            target._add_action(action)
