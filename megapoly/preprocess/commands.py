"""Sub-commands of ``tools/preprocess_data.py``."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence

# Each a module with `add_arguments(parser)` and `run(options) -> exit status`.
COMMANDS = {
    "verify": "megapoly.preprocess.verify",
    "merge": "megapoly.preprocess.merge",
    "inspect": "megapoly.preprocess.inspect_pair",
    "stats": "megapoly.preprocess.stats",
}


def run(name: str, words: Sequence[str]) -> int:
    """Run a sub-command; its exit status."""
    module = importlib.import_module(COMMANDS[name])
    parser = argparse.ArgumentParser(
        prog=f"preprocess_data.py {name}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    module.add_arguments(parser)
    status: int = module.run(parser.parse_args(words))
    return status
