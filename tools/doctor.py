"""What is installed, in which versions, what for, and whether it works together on this machine.

    python tools/doctor.py
    python tools/doctor.py --json

Packages with code for GPUs are opened, each in a process of its own; nothing is computed, and no
memory of a GPU is taken. The exit status is 0 when training can run here (on CPU, too), 1 when
something that it needs is missing, broken, or known not to work with the rest, 2 for a wrong
option.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # this checkout's, from wherever it is called


def main(argv: Sequence[str] | None = None) -> int:
    """Examine and print; see the module for the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print an object instead of a table")
    options = parser.parse_args(argv)
    try:
        from megapoly.doctor.checks import examine
        from megapoly.doctor.facts import gather
        from megapoly.doctor.requirements import all_packages
        from megapoly.doctor.table import print_lines
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


if __name__ == "__main__":
    sys.exit(main())
