"""Measure operators, training or preprocessing against something else, in the same run.

    megapoly benchmark operators     PolyNorm and PolyReLU against other ways to compute them
    megapoly benchmark training      training speed on CPU against plain PyTorch
    megapoly benchmark preprocess    documents per CPU-second against the usual loop

each with --help.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

BENCHMARKS = ("operators", "training", "preprocess")


def main(argv: Sequence[str]) -> int:
    """Run a benchmark; its exit status, or 2 when there is none of that name."""
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if argv else 2
    name, *rest = argv
    if name not in BENCHMARKS:
        print(
            f"megapoly benchmark: `{name}` is not one of {', '.join(BENCHMARKS)}", file=sys.stderr
        )
        return 2
    return int(importlib.import_module(f"megapoly.benchmarks.{name}").main(rest))
