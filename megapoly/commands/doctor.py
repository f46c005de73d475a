"""Check what is installed, in which versions, and whether it works together on this machine.

    megapoly doctor
    megapoly doctor --json

Lists every package with what it is for, the GPUs, limits of the system, and which commands can run.
Packages with code for GPUs are imported, each in a separate process; nothing is computed, and no
memory of a GPU is taken. The exit status is 0 when training can run here (also on CPU), 1 when
something that it needs is missing, broken, or known not to work with the rest, 2 for a wrong
option.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict

from megapoly.commands import COMMANDS
from megapoly.config.command_line import Parser
from megapoly.platform import extras
from megapoly.platform.logs import discard_output


def main(argv: Sequence[str] | None = None) -> int:
    """Examine and print; see the module for the exit status."""
    options = build_parser().parse_args(argv)
    try:
        from megapoly.preflight.doctor.checks import examine
        from megapoly.preflight.doctor.facts import gather
        from megapoly.preflight.doctor.requirements import all_packages
        from megapoly.preflight.doctor.table import print_lines
    except ImportError as error:
        print(f"{error}; `pip install megapoly` installs what is needed", file=sys.stderr)
        return 1
    facts = gather(all_packages())
    lines = examine(facts)
    usable = all(line.status != "wrong" for line in lines)
    missing = {name: command.missing() for name, command in COMMANDS.items()}
    try:
        if options.json:
            found = {"usable": usable, "lines": [asdict(line) for line in lines]}
            found |= {"missing_by_command": missing, "facts": asdict(facts)}
            print(json.dumps(found, indent=2), flush=True)
        else:
            print_lines(lines, command_lines(missing))
    except (BrokenPipeError, SystemExit):  # rich's; the reader of the output has ended
        discard_output()
    return 0 if usable else 1


def command_lines(missing: dict[str, dict[str, list[str]]]) -> list[str]:
    """Return one line on the commands that can run, and one for each set that cannot."""
    can_run = [name for name, absent in missing.items() if not absent]
    cannot: dict[str, list[str]] = {}
    for name, absent in missing.items():
        if absent:
            cannot.setdefault(extras.with_remedy(absent), []).append(name)
    lines = [f"{', '.join(names)} cannot run without {needs}" for needs, names in cannot.items()]
    return [f"Commands that can run: {', '.join(can_run)}", *lines]


def build_parser() -> Parser:
    """Return the command's parser."""
    parser = Parser("doctor", __doc__)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser
