"""Check on a CPU that a configuration trains the same model at every parallel layout.

    megapoly check-parallel --config moe_7b_paper --world-size 1 2 4 8

Trains a scaled-down copy of the configuration for a few steps as one process, and then at each
layout from the same initial weights and data. Compares losses, the gradient norm and the gradient
of every parameter, assembled from all processes. The exit status is 0 when all differences are
within rounding, 1 when one is not or a layout fails, 2 when the configuration cannot be used.

A layout's name has its sizes above 1 and its options, joined by -. Sizes are tp (tensor), cp
(context), pp (pipeline), vpp (interleaved chunks), ep (expert), etp (expert tensor, if it differs
from tp) and dp (data). Options are nosp (no sequence parallelism), a2a (context parallelism that
exchanges heads) and distopt (distributed optimizer with overlap): tp2-ep4-etp1-dp2-distopt.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
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
from megapoly.config.rules import find_problems
from megapoly.errors import ConfigError, MegapolyError
from megapoly.platform.logs import show_errors_only
from megapoly.platform.machine import CPU
from megapoly.preflight.layouts import Layout, covering, parse_layout

if TYPE_CHECKING:
    from megapoly.preflight.parallel_check.report import Report

DEFAULT_RECIPE = "moe_tiny"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the check; see the module for the exit status."""
    options, overrides = parse_with_overrides(
        build_parser(), sys.argv[1:] if argv is None else argv
    )
    show_errors_only()
    try:
        given = parse_config(
            ["--config", options.config, *overrides],
            default_recipe=DEFAULT_RECIPE,
            program="megapoly check-parallel",
        )
        return _check(options, given.config)
    except MegapolyError as error:
        print(error, file=sys.stderr)
        return 2


def build_parser() -> Parser:
    """Return the command's parser."""
    parser = Parser(
        "check-parallel",
        __doc__,
        earlier={"--world_sizes": "--world-size", "--timeout_s": "--timeout-s"},
        epilog="Options of the configuration, --SECTION.FIELD VALUE, override the recipe's.",
    )
    add = parser.add_argument
    add(
        "--config",
        default=DEFAULT_RECIPE,
        metavar="RECIPE",
        help="by name, or a YAML file (moe_tiny)",
    )
    add(
        "--layouts",
        nargs="+",
        metavar="NAME",
        help="layouts by name, or `all` that the configuration's rules allow (default: a few that "
        "cover every pair of choices)",
    )
    add(
        "--world-size",
        nargs="+",
        type=at_least(1, MOST_PROCESSES),
        metavar="N",
        help="numbers of processes (1 2 4 8); layouts by name are filled up with data parallelism, "
        "and without this option run on as many processes as they need",
    )
    add(
        "--steps",
        type=at_least(1),
        default=3,
        metavar="N",
        help="training steps at each layout (3)",
    )
    add("--precision", choices=("fp32", "bf16"), default="fp32", help="of the computation (fp32)")
    add(
        "--timeout-s",
        type=number(above=0.0, most=1e6),
        default=600.0,
        metavar="X",
        help="seconds for one layout (600)",
    )
    add("--json", type=Path, metavar="FILE", help="write a report with every parameter")
    return parser


def _check(options: argparse.Namespace, config: Config) -> int:
    # Here, not above: --help and a wrong option answer without importing torch.
    from megapoly.preflight.parallel_check.comparison import BF16, FP32
    from megapoly.preflight.parallel_check.report import Report
    from megapoly.preflight.parallel_check.scaled import left_out, scaled_down

    if options.json:
        check_can_write("--json", options.json)
    bf16 = options.precision == "bf16"
    layouts = _requested(options, config)
    small = scaled_down(config, steps=options.steps, bf16=bf16, layouts=layouts)
    if problems := _problems(Layout(), small):
        raise ConfigError(problems)
    layouts = _allowed(options, layouts, small)
    report = Report(small, BF16 if bf16 else FP32, [], left_out(config))
    with tempfile.TemporaryDirectory(prefix="check-parallel-") as cache_dir:
        _train_all(report, layouts, Path(cache_dir), options.timeout_s)
    console = Console()
    console.print(report.table())
    for line in report.findings():
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    if options.json:
        report.write_json(options.json)
    return 0 if report.is_right else 1


def _requested(options: argparse.Namespace, config: Config) -> list[Layout]:
    """Return the layouts by name, or all of the numbers of processes."""
    from megapoly.preflight.parallel_check.scaled import WORLD_SIZES, candidates

    sizes = options.world_size
    if options.layouts in (None, ["all"]):
        return candidates(config, sizes or WORLD_SIZES)
    named = [parse_layout(name) for name in options.layouts]
    if sizes:
        filled = [layout.at(world_size) for layout in named for world_size in sizes]
        named = [layout for layout in filled if layout is not None]
    if not named:
        raise ConfigError([f"none of the layouts fits {sizes} processes; leave out --world-size"])
    return list(dict.fromkeys(named))


def _allowed(options: argparse.Namespace, layouts: list[Layout], small: Config) -> list[Layout]:
    """Refuse a layout by name that breaks a rule, with the rule; leave out others that do."""
    problems = {layout: _problems(layout, small) for layout in layouts}
    if options.layouts in (None, ["all"]):
        allowed = [layout for layout, broken in problems.items() if not broken]
        if options.layouts:
            return allowed
        by_size: dict[int, list[Layout]] = {}
        for layout in allowed:
            by_size.setdefault(layout.world_size, []).append(layout)
        return [layout for every in by_size.values() for layout in covering(every)]
    if any(problems.values()):
        raise ConfigError(
            [
                f"{layout.name}: {problem} (sizes of the small copy)"
                for layout, broken in problems.items()
                for problem in broken
            ]
        )
    return layouts


def _problems(layout: Layout, small: Config) -> list[str]:
    return find_problems(
        layout.applied_to(small),
        world_size=layout.world_size,
        machine=CPU,
    )


def _train_all(report: Report, layouts: list[Layout], cache_dir: Path, timeout_s: float) -> None:
    from megapoly.preflight.parallel_check.comparison import compare
    from megapoly.preflight.parallel_check.job import train_at
    from megapoly.preflight.parallel_check.report import Row

    columns = (BarColumn(bar_width=20), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.description}"), console=Console(stderr=True)) as bar:
        task = bar.add_task("one process", total=len(layouts) + 1)
        try:
            expected = train_at(report.config, Layout(), cache_dir=cache_dir, timeout_s=timeout_s)
        except (RuntimeError, TimeoutError) as error:
            raise MegapolyError(f"The configuration fails on one process: {error}") from error
        bar.advance(task)
        for layout in layouts:
            processes = f"{layout.world_size} process{'es' if layout.world_size > 1 else ''}"
            bar.update(task, description=f"{layout.name}, {processes}")
            row, start = Row(layout, 0.0), time.perf_counter()
            try:
                steps = train_at(report.config, layout, cache_dir=cache_dir, timeout_s=timeout_s)
                row.comparison = compare(steps, expected)
            except (RuntimeError, TimeoutError) as error:
                row.failure = str(error)
            row.seconds = time.perf_counter() - start
            report.rows.append(row)
            bar.advance(task)
        bar.update(task, description="done")
