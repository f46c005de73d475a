"""Measure operators, training, saving or preprocessing against something else, in the same run.

    megapoly benchmark operators     PolyNorm and PolyReLU against other ways to compute them
    megapoly benchmark training      training speed on CPU against plain PyTorch
    megapoly benchmark saving        seconds that saving a checkpoint holds the training loop up
    megapoly benchmark preprocess    documents per CPU-second against the usual loop

Each has its own options: megapoly benchmark NAME --help.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from types import ModuleType

from megapoly.config.command_line import Parser

BENCHMARKS = ("operators", "training", "saving", "preprocess")


def main(argv: Sequence[str]) -> int:
    """Run a benchmark and return its exit status."""
    name = build_parser().parse_args(argv[:1]).name
    return int(module_of(name).main(argv[1:]))


def build_parser() -> Parser:
    """Return the parser of the benchmark's name."""
    parser = Parser("benchmark", __doc__, usage="%(prog)s NAME [options]")
    names = ", ".join(BENCHMARKS)
    parser.add_argument("name", choices=BENCHMARKS, metavar="NAME", help=f"one of {names}")
    return parser


def module_of(name: str) -> ModuleType:
    """Import and return the module of a benchmark, with ``main(argv)`` and ``build_parser()``."""
    return importlib.import_module(f"megapoly.benchmarks.{name}")
