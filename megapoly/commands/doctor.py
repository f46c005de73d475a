"""What is installed, in which versions, what for, and whether it works together on this machine.

    megapoly doctor
    megapoly doctor --json

Packages with code for GPUs are opened, each in a process of its own; nothing is computed, and no
memory of a GPU is taken. The exit status is 0 when training can run here (on CPU, too), 1 when
something that it needs is missing, broken, or known not to work with the rest, 2 for a wrong
option.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict

from megapoly.config.command_line import Parser


def main(argv: Sequence[str] | None = None) -> int:
    """Examine and print; see the module for the exit status."""
    options = build_parser().parse_args(argv)
    try:
        from megapoly.preflight.doctor.checks import examine
        from megapoly.preflight.doctor.facts import gather
        from megapoly.preflight.doctor.requirements import all_packages
        from megapoly.preflight.doctor.table import print_lines
    except ImportError as error:
        print(f"{error}; `pip install -e .` installs what is needed", file=sys.stderr)
        return 1
    facts = gather(all_packages())
    lines = examine(facts)
    usable = all(line.status != "wrong" for line in lines)
    try:
        if options.json:
            found = {"usable": usable, "lines": [asdict(line) for line in lines]}
            print(json.dumps(found | {"facts": asdict(facts)}, indent=2), flush=True)
        else:
            print_lines(lines)
    except (BrokenPipeError, SystemExit):  # rich's; whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0 if usable else 1


def build_parser() -> Parser:
    """Return the command's parser."""
    parser = Parser("doctor", __doc__)
    parser.add_argument("--json", action="store_true", help="print an object instead of a table")
    return parser
