"""Show how runs are: state, step, loss, speed, last checkpoint, and whether they still advance.

    megapoly status runs/moe_tiny
    megapoly status runs --watch
    megapoly status runs/moe_tiny --check
    megapoly status runs --json | jq '.[] | select(.health.is_well | not) | .folder'

RUN_DIR is the folder of a run, or one with runs below it, such as a comparison's. One run is shown
in detail, several as a table. Each run writes RUN_DIR/status.json; of a run of an earlier version,
which has none, the steps, losses and checkpoints are read from its other files. Nothing is changed.

A run that was killed says nothing. On its host it is shown as `dead`, because its process is gone;
elsewhere as `silent`, when the next sign of life is a minute later than the run said it would be.

--check is for probes and cron: one sentence for each run, and the exit status 0 if every run is
starting, advancing in time, complete, or stopped on request; 1 if one failed, is dead or silent,
has a damaged status.json, or if there is none. It imports no torch.

Otherwise the exit status is 0; 2 if RUN_DIR has no run.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from megapoly.config.command_line import Parser, number, status_of
from megapoly.errors import UnavailableError
from megapoly.training.run_status.columns import plain_lines
from megapoly.training.run_status.folders import runs_below
from megapoly.training.run_status.reading import Watched, read_run

_INTERVAL_S = 2.0


def main(argv: Sequence[str] | None = None) -> int:
    """Show runs; the module describes the exit status."""
    parser = build_parser()
    options = parser.parse_args(argv)
    if options.interval is not None and not options.watch:
        parser.error("--interval has no effect without --watch; leave it out")
    return status_of(lambda: _run(options))


def build_parser() -> Parser:
    """Return the command's parser."""
    parser = Parser("status", __doc__)
    parser.add_argument("folders", nargs="+", type=Path, metavar="RUN_DIR", help="run, or runs")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--watch", action="store_true", help="show it again and again, until Ctrl-C")
    how.add_argument("--json", action="store_true", help="print a list of objects for programs")
    how.add_argument("--check", action="store_true", help="print sentences; status 1 if one is ill")
    parser.add_argument(
        "--interval",
        type=number(least=0.1, most=86_400.0),
        metavar="S",
        help=f"seconds between two looks of --watch ({_INTERVAL_S:g})",
    )
    return parser


def _run(options: argparse.Namespace) -> int:
    if options.check:
        return _check(options.folders)
    if options.watch:
        return _watch(options.folders, options.interval or _INTERVAL_S)
    runs = _read(options.folders)
    if options.json:
        print(json.dumps([run.to_dict() for run in runs], indent=1))
        return 0
    if not sys.stdout.isatty():
        print(_plain(runs))
        return 0
    from rich.console import Console

    from megapoly.training.run_status.view import show

    console = Console(highlight=False)
    console.print(show(runs, console))
    return 0


def _plain(runs: Sequence[Watched]) -> str:
    return "\n".join(plain_lines(runs))


def _read(folders: Sequence[Path]) -> list[Watched]:
    """Return all runs of the folders.

    Raises:
        UnavailableError: a folder has none.
    """
    found = []
    for folder in folders:
        runs = runs_below(folder)
        if not runs:
            raise UnavailableError(f"{_no_run(folder)}; give the `run_dir` of a run that has begun")
        found += [read_run(run, time.time()) for run in runs]
    return found


def _no_run(folder: Path) -> str:
    missing = "" if folder.exists() else ", which does not exist"
    return f"`{folder}`{missing}: no run has begun there, with status.json or metrics.jsonl"


def _check(folders: Sequence[Path]) -> int:
    """Print a sentence for each run; return 1 if one is not well."""
    is_well = True
    for folder in folders:
        runs = runs_below(folder)
        if not runs:
            is_well = False
            print(_no_run(folder))
        for run in runs:
            health = read_run(run, time.time()).health
            is_well = is_well and health.is_well
            print(f"{run}: {health.sentence}")
    return 0 if is_well else 1


def _watch(folders: Sequence[Path], interval_s: float) -> int:
    """Show the runs until Ctrl-C, or until the reader of the output ends."""
    try:
        if sys.stdout.isatty():
            _watch_on_screen(folders, interval_s)
        while True:
            print(_plain(_read(folders)), flush=True)
            time.sleep(interval_s)
    except KeyboardInterrupt:
        return 0


def _watch_on_screen(folders: Sequence[Path], interval_s: float) -> NoReturn:
    from rich.console import Console
    from rich.live import Live

    from megapoly.training.run_status.view import show

    console = Console(highlight=False)
    first = show(_read(folders), console)
    with Live(first, console=console, auto_refresh=False, screen=True) as live:
        while True:
            time.sleep(interval_s)
            live.update(show(_read(folders), console), refresh=True)
