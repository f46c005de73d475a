"""Estimate what a job takes before any machine is rented: parameters, memory, messages, time.

    megapoly plan --config moe_7b_paper --world-size 64 --gpu a100-80g

Prints the model's parameters, the layout's ranks, the memory of a rank, every message of a step
with the link that it crosses, and a lower bound on the time of a step, which is an upper bound on
MFU. With --search it also prints the layouts that fit, the fastest first, or only these if the
layout of the configuration cannot run. It needs neither the data nor a GPU.

The exit status is 0 when the configuration can run and fits, 1 when it does not fit, 2 when it
cannot run or the plan cannot be written.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from megapoly.config import Config
from megapoly.config.command_line import Parser, at_least, parse_with_overrides, status_of
from megapoly.config.parsing import parse as parse_config
from megapoly.config.ranges import LARGEST_WORLD_SIZE
from megapoly.config.rules import find_problems
from megapoly.errors import ConfigError
from megapoly.platform.gpus import GPUS
from megapoly.platform.logs import show_errors_only
from megapoly.platform.machine import Machine

if TYPE_CHECKING:
    from megapoly.preflight.planning.search import FittingLayout

DEFAULT_RECIPE = "moe_7b_paper"


def main(argv: Sequence[str] | None = None) -> int:
    """Plan; see the module for the exit status."""
    options, overrides = parse_with_overrides(
        build_parser(), sys.argv[1:] if argv is None else argv
    )
    show_errors_only()

    def plan() -> int:
        given = parse_config(
            ["--config", options.config, *overrides],
            default_recipe=DEFAULT_RECIPE,
            program="megapoly plan",
        )
        return _plan(options, given.config)

    return status_of(plan)


class _Console(Console):
    """A console that does not end the program with 1, which means that the plan does not fit."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def build_parser() -> Parser:
    """Return the command's parser."""
    parser = Parser("plan", __doc__)
    parser.epilog = "Options of the configuration, --SECTION.FIELD VALUE, override the recipe's."
    add = parser.add_argument
    add(
        "--config",
        default=DEFAULT_RECIPE,
        metavar="RECIPE",
        help="recipe by name, or a YAML file (moe_7b_paper)",
    )
    add(
        "--world-size",
        type=at_least(1, LARGEST_WORLD_SIZE),
        required=True,
        metavar="N",
        help="number of GPUs",
    )
    add("--gpu", choices=GPUS, default="a100-80g", help="GPU of every process (a100-80g)")
    add(
        "--local-spec",
        action="store_true",
        help="plan for machines without Transformer Engine",
    )
    add(
        "--search",
        nargs="?",
        type=at_least(1),
        const=10,
        metavar="N",
        help="print the N layouts (10) that fit and may be fastest",
    )
    add(
        "--json",
        nargs="?",
        const="-",
        metavar="FILE",
        help="write everything as JSON to FILE, or print it instead of the tables",
    )
    return parser


def _plan(options: argparse.Namespace, config: Config) -> int:
    # Here, not above: --help and a wrong option answer without importing torch.
    from megapoly.preflight.planning import report
    from megapoly.preflight.planning.plan import Plan
    from megapoly.preflight.planning.planned_config import planned_config
    from megapoly.preflight.planning.search import allowed_layout, remedies, search

    _refuse_cpu(config)
    gpu, world_size = GPUS[options.gpu], options.world_size
    machine = Machine(
        cuda=True,
        compute_capability=gpu.compute_capability,
        transformer_engine=not options.local_spec,
        # A configuration that was resolved on a machine with apex has it enabled.
        apex=bool(config.training.gradient_accumulation_fusion),
    )
    allows = partial(_allows, world_size=world_size, machine=machine)
    resolve = partial(planned_config, world_size=world_size, machine=machine)
    try:
        resolved = resolve(config)
    except ConfigError as error:
        base = allowed_layout(config, world_size, gpu, allows) if options.search else None
        if base is None:
            raise
        found = search(resolve(base), config, world_size, gpu, allows)
        values = {"problems": error.problems, "search": _found_values(found, options.search)}
        if _write_json(options, values):
            print(error, file=sys.stderr)
            _show_search(found, options.search)
        return 2
    plan = Plan(resolved, world_size, gpu)
    changes = [] if plan.fits else remedies(plan, config, resolve)
    values = plan.as_dict()
    values["suggestions"] = [
        {"options": change, "memory": changed.needed_memory} for change, changed in changes
    ]
    if options.search:
        found = search(plan.config, config, world_size, gpu, allows)
        values["search"] = _found_values(found, options.search)
    if not _write_json(options, values):
        return 0 if plan.fits else 1
    console = _Console()
    report.show(plan, console)
    if not plan.fits:
        console.print("With one of these changes it fits:" if changes else report.NOTHING_ALONE)
        for line in report.suggestions(changes):
            console.print(f"  {line}", highlight=False, markup=False, soft_wrap=True)
    if options.search:
        _show_search(found, options.search)
    return 0 if plan.fits else 1


def _found_values(found: list[FittingLayout], limit: int) -> list[dict[str, Any]]:
    return [
        {
            "options": item.options,
            "memory": item.plan.needed_memory,
            "step_seconds": item.plan.step.total,
            "mfu": item.plan.step.mfu,
            "days": item.plan.days,
        }
        for item in found[:limit]
    ]


def _write_json(options: argparse.Namespace, values: dict[str, Any]) -> bool:
    """Write JSON as requested; return whether to print tables."""
    text = json.dumps(values, indent=2)
    if options.json == "-":
        print(text, flush=True)
    elif options.json:
        Path(options.json).write_text(text + "\n", encoding="utf-8")
    return bool(options.json != "-")


def _show_search(found: list[FittingLayout], limit: int) -> None:
    from megapoly.preflight.planning import report

    console = _Console()
    console.print(report.search_table(found, limit))
    if found:
        best = report.arguments(found[0].options) or "as configured"
        console.print(f"first: {best}", highlight=False, markup=False, soft_wrap=True)


def _refuse_cpu(config: Config) -> None:
    """Refuse a configuration of a run on CPU, which disables GPUs in several options."""
    if config.training.device != "cpu":
        return
    names = ("transformer_engine", "apply_rope_fusion", "moe_permute_fusion")
    off = [f"--model.{name} null" for name in names if getattr(config.model, name) is False]
    change = " ".join(["--training.device auto", *off])
    raise ConfigError([f"`training.device` (cpu) cannot be planned for GPUs; add {change}"])


def _allows(config: Config, *, world_size: int, machine: Machine) -> bool:
    return not find_problems(config, world_size=world_size, machine=machine, with_files=False)
