"""Let faults strike a job again and again, and compare it with an uninterrupted run.

    megapoly soak --config dense_tiny --faults 100 --nproc-per-node 2
    megapoly soak --config dense_tiny --faults 100 --checkpoint.save_interval 1 --kinds job save

The job is started, meets a fault, and is started again by the same command until it is complete.
After each fault no process may be left, no saved step may be missing, and the metrics must be those
of a run without faults. The metrics and the last checkpoint of a complete run must equal that run's
to the bit; times and the state of generators that nothing draws from are not compared. The next
fault then strikes a new run.

Kinds of faults, moments, ranks and bits are drawn from --seed. On a CPU processes are forked from
one that has imported everything; with --new-processes, and on CUDA, each starts an interpreter of
its own. The exit status is 0 when all was survived, 1 when something was lost, 2 when the job
cannot be started or fails without a fault.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from megapoly.config import Config
from megapoly.config.command_line import (
    Parser,
    at_least,
    check_can_write,
    number,
    parse_with_overrides,
)
from megapoly.config.parsing import parse as parse_config
from megapoly.config.ranges import MOST_PROCESSES
from megapoly.errors import ConfigError, MegapolyError, UnavailableError
from megapoly.platform.logs import show_errors_only

if TYPE_CHECKING:
    from megapoly.testing.soak.loop import Plan
    from megapoly.testing.soak.report import Report

DEFAULT_RECIPE = "dense_tiny"
KINDS = ("job", "save", "rank", "launcher", "terminate", "stop", "flip", "truncate", "disk", "nan")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the soak; see the module for the exit status."""
    options, overrides = parse_with_overrides(
        build_parser(), sys.argv[1:] if argv is None else argv
    )
    show_errors_only()
    try:
        if options.json:
            check_can_write("--json", options.json)
        arguments = ["--config", options.config, *overrides]
        given = parse_config(arguments, default_recipe=DEFAULT_RECIPE, program="megapoly soak")
        return _soak(options, _plan(options, given.config, arguments))
    except MegapolyError as error:
        print(error, file=sys.stderr)
        return 2


def build_parser() -> Parser:
    """Return the command's parser."""
    parser = Parser(
        "soak",
        __doc__,
        epilog="Options of the configuration, --SECTION.FIELD VALUE, override the recipe's.",
    )
    add = parser.add_argument
    add(
        "--config",
        default=DEFAULT_RECIPE,
        metavar="RECIPE",
        help="by name, or a YAML file (dense_tiny)",
    )
    add("--faults", type=at_least(1), default=30, metavar="N", help="number of faults (30)")
    add(
        "--kinds",
        nargs="+",
        choices=KINDS,
        default=KINDS,
        metavar="KIND",
        help=f"faults to draw from: {', '.join(KINDS)} (default: all of them that fit the job)",
    )
    add("--seed", type=at_least(0), default=0, metavar="N", help="of everything drawn (0)")
    add(
        "--nproc-per-node",
        type=at_least(1, MOST_PROCESSES),
        default=1,
        metavar="N",
        help="processes of the job (1)",
    )
    add(
        "--output",
        type=Path,
        default=Path("runs/soak"),
        metavar="FOLDER",
        help="empty folder for runs and logs; runs that were lost stay there (runs/soak)",
    )
    add(
        "--timeout-s",
        type=number(above=0.0, most=1e6),
        default=300.0,
        metavar="X",
        help="longest wait for a job to save, or to end (300)",
    )
    add("--new-processes", action="store_true", help="start interpreters; do not fork")
    add("--json", type=Path, metavar="FILE", help="write every outcome")
    return parser


def _plan(options: argparse.Namespace, config: Config, arguments: list[str]) -> Plan:
    # Here, not above: --help and a wrong option answer without importing torch.
    from megapoly.platform.device import default_device
    from megapoly.testing.soak.loop import Plan

    _check(options, config)
    device = config.training.device
    on_gpu = (default_device() if device == "auto" else device) == "cuda"
    return Plan(
        argv=arguments,
        folder=options.output,
        num_processes=options.nproc_per_node,
        num_faults=options.faults,
        kinds=options.kinds,
        seed=options.seed,
        nan_steps=_nan_steps(options, config),
        new_processes=options.new_processes or on_gpu,
        timeout_s=options.timeout_s,
    )


def _nan_steps(options: argparse.Namespace, config: Config) -> tuple[tuple[int, int], ...]:
    """Return steps and ranks that meet NaN in every run; none if NaN is not left out."""
    training = config.training
    if training.spike_action != "skip" or "nan" not in options.kinds:
        return ()
    if training.train_iters is None:
        raise ConfigError(
            ["a soak with nan and `training.spike_action` skip needs `training.train_iters`"]
        )
    drawn = random.Random(options.seed)
    number = min(training.spike_max_skips, training.train_iters // 4)
    steps = drawn.sample(range(1, training.train_iters + 1), number)
    return tuple((step, drawn.randrange(options.nproc_per_node)) for step in sorted(steps))


def _check(options: argparse.Namespace, config: Config) -> None:
    """Check what the rules of a job do not.

    Raises:
        ConfigError: the job saves no checkpoints, or too few.
        UnavailableError: the folder is not empty.
    """
    checkpoint, damages = config.checkpoint, {"flip", "truncate"}.intersection(options.kinds)
    problems = []
    if not (checkpoint.save and checkpoint.save_interval and checkpoint.resume):
        problems.append(
            "a soak needs a job that saves and resumes; set `checkpoint.save_interval` above 0, "
            "`checkpoint.save` and `checkpoint.resume` to true"
        )
    if damages and checkpoint.keep == 1:
        problems.append(
            f"a soak with {' and '.join(sorted(damages))} needs a second checkpoint; set "
            "`checkpoint.keep` (1) to 2 or more, or choose other `--kinds`"
        )
    if problems:
        raise ConfigError(problems)
    folder = options.output
    if folder.exists() and not (folder.is_dir() and next(folder.iterdir(), None) is None):
        raise UnavailableError(
            f"`--output` ({folder}) must be an empty or a new folder; delete it, or choose another"
        )


def _soak(options: argparse.Namespace, plan: Plan) -> int:
    from megapoly.testing.soak.report import Report

    report = Report()
    try:
        _strike(options, plan, report)
    finally:  # also of a soak that is stopped
        if report.outcomes:
            console = Console()
            console.print(report.table())
            for line in report.findings():
                console.print(line, highlight=False, markup=False, soft_wrap=True)
    return 1 if report.lost else 0


def _strike(options: argparse.Namespace, plan: Plan, report: Report) -> None:
    """Let all faults strike, with a progress bar; the report has what was found so far."""
    from megapoly.testing.soak.loop import Soak

    columns = (BarColumn(bar_width=20), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.description}"), console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=plan.num_faults)
        soak = Soak(plan, lambda text: bar.update(task, description=_counted(text, report)))
        for outcome in soak.outcomes():
            report.outcomes.append(outcome)
            bar.update(task, completed=report.num_faults)
            if options.json:
                report.write_json(options.json, {"seed": plan.seed, "arguments": plan.argv})
        bar.update(task, description=_counted("done", report))


def _counted(text: str, report: Report) -> str:
    return f"{text}; {len(report.lost)} lost" if report.lost else text
