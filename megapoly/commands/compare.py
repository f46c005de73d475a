r"""Compare activations on the same model, order of the data, tokens and number of parameters.

    megapoly compare --config dense_miniature \
        --config runs/paper/data/data.yaml --output runs/paper/dense \
        --activations swiglu gelu relu polyrelu polynorm --learning-rates 4e-3 8e-3 --seeds 1 2 3

With several --learning-rates, every activation is trained at each rate with the first seed. The
rate with the lowest validation loss, and those within --margin of it, are then trained with the
other seeds; the activation is compared at its best rate over all seeds. A rate at which the loss
becomes infinite or NaN is ruled out. A seed determines the initial weights and the order of the
data, so activations are compared on the same samples. `polyrelu:4` is polyrelu of order 4;
--orders 2 3 4 trains all polynomial activations that are named without an order at these orders.

Each run has its folder OUTPUT/ACTIVATION.lr_RATE.seed_SEED; the same command resumes where it was
stopped. At the end it prints tables of all runs in OUTPUT, with differences to swiglu if it is
among them. megapoly report makes a page of them; megapoly analyze analyses the models.

--jobs is the number of runs at the same time. Each run has --nproc-per-node processes on this
machine, or is started elsewhere by --launcher:

    --jobs 5 --launcher 'sbatch --wait --nodes 4 examples/slurm/pretrain.sbatch
        examples/pretrain_dense.sh'

On Ctrl-C or SIGTERM the command sends SIGTERM to the jobs and waits until they have saved. This
ends `sbatch --wait`, but not its job: cancel that before you run the same command again.

Options of the configuration, `--section.field value`, apply to all runs; one that only some of the
activations have, such as --model.activation_eps, to theirs. The exit status is 0, or 2
with the reason, also if runs failed.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from megapoly.config.command_line import (
    Parser,
    at_least,
    number,
    parse_with_overrides,
    status_of,
)
from megapoly.config.ranges import MOST_PROCESSES, SEEDS_BELOW
from megapoly.errors import ConfigError
from megapoly.platform.logs import show_errors_only
from megapoly.platform.output import train_on_without_output
from megapoly.polynomial import DEFAULT_ORDER, ORDERS

if TYPE_CHECKING:
    from megapoly.config import Config
    from megapoly.study.comparison.trials import Variant

# Activation that the others are compared with, if it is among them.
REFERENCE = "swiglu"
# Options of the configuration in which trials differ, and the options that set them.
SET_BY_TRIALS = {
    "model.activation": "--activations",
    "model.activation_order": "--orders",
    "training.seed": "--seeds",
    "data.seed": "--seeds",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Compare and return the exit status; see the module."""
    given = list(sys.argv[1:] if argv is None else argv)
    parser = build_parser()
    arguments, overrides = parse_with_overrides(parser, given)
    _check_options(parser, arguments, overrides)
    show_errors_only()
    return status_of(lambda: _compare(arguments, overrides, given))


def build_parser() -> Parser:
    """Return the command's parser."""
    parser = Parser("compare", __doc__, earlier={"--processes": "--nproc-per-node"})
    add = parser.add_argument
    rate = number(above=0.0, most=1.0)
    add(
        "--config",
        action="append",
        required=True,
        metavar="RECIPE",
        help="name or YAML file; may be repeated, later ones take precedence",
    )
    add("--output", required=True, type=Path, metavar="FOLDER", help="folder of all runs")
    add(
        "--activations",
        nargs="+",
        required=True,
        metavar="NAME",
        help="activation, or activation:order",
    )
    add(
        "--orders",
        nargs="+",
        type=at_least(min(ORDERS), max(ORDERS)),
        choices=ORDERS,
        metavar="R",
        help=f"orders of polynomial activations: {ORDERS} (default: {DEFAULT_ORDER})",
    )
    add(
        "--seeds",
        nargs="+",
        type=at_least(0, SEEDS_BELOW - 1),
        default=[1],
        metavar="N",
        help="default: 1",
    )
    add(
        "--learning-rates",
        nargs="+",
        type=rate,
        metavar="X",
        help="grid (default: the rate of the configuration); optimizer.min_lr and "
        "optimizer.lr_warmup_init keep their ratios",
    )
    add(
        "--margin",
        type=number(least=0.0, most=100.0),
        default=0.0,
        metavar="LOSS",
        help="also train rates this near to the best with the other seeds (default: 0)",
    )
    add(
        "--jobs",
        type=at_least(1, MOST_PROCESSES),
        metavar="N",
        help="runs at the same time (default: cores / processes; with --launcher 1)",
    )
    add(
        "--nproc-per-node",
        type=at_least(1, MOST_PROCESSES),
        metavar="N",
        help="processes of each run on this machine (default: 1)",
    )
    add(
        "--launcher", metavar="COMMAND", help="command that starts a run; --config FILE is appended"
    )
    add("--tasks", nargs="+", metavar="NAME", help="benchmarks after the last step")
    add("--task-data", metavar="FOLDER", help="questions, as for megapoly evaluate")
    add(
        "--task-limit",
        type=at_least(1),
        metavar="N",
        help="questions of each task (default: all)",
    )
    add("--dry-run", action="store_true", help="check and list the runs, start none")
    return parser


def _check_options(parser: Parser, arguments: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Refuse options that have no effect or contradict each other."""
    set_by = SET_BY_TRIALS | (
        {"optimizer.lr": "--learning-rates"} if arguments.learning_rates else {}
    )
    for override in overrides:
        name = override.removeprefix("--").partition("=")[0]
        if name in set_by:
            parser.error(f"--{name} is set by {set_by[name]}; leave it out")
    if not arguments.tasks and (arguments.task_data or arguments.task_limit):
        parser.error("--task-data and --task-limit are for --tasks; give tasks, or leave them out")
    if arguments.margin and not (len(arguments.learning_rates or ()) > 1 < len(arguments.seeds)):
        parser.error("--margin is for several --learning-rates and --seeds; leave it out")
    if arguments.launcher is not None and arguments.nproc_per_node:
        parser.error(
            "--nproc-per-node is for runs on this machine; with --launcher, give it to the launcher"
        )
    # Rates as in the names of the folders, which have six digits.
    rates = [f"{rate:g}" for rate in arguments.learning_rates or ()]
    for option, names in (("--seeds", arguments.seeds), ("--learning-rates", rates)):
        if len(set(names)) < len(names):
            parser.error(f"{option}: each must be given once, not {' '.join(map(str, names))}")


def _compare(arguments: argparse.Namespace, overrides: Sequence[str], given: list[str]) -> int:
    # Imported here, so that --help does not wait for torch.
    from megapoly.study.comparison import trials
    from megapoly.study.comparison.comparison import Comparison
    from megapoly.study.comparison.record import ComparisonRecord
    from megapoly.study.report.terminal import show_tables

    variants = trials.parse_variants(arguments.activations, arguments.orders)
    base = _base(arguments, overrides, variants)
    trials.check_comparable(base, variants)
    at_once, environment = _shares(arguments)
    study = Comparison(
        base=base,
        variants=variants,
        rates=arguments.learning_rates or [base.optimizer.lr],
        seeds=arguments.seeds,
        margin=arguments.margin,
        output=arguments.output,
        launcher=_launcher(arguments),
        at_once=at_once,
        environment=environment,
    )
    console = Console()
    for line in trials.describe(base, variants):
        console.print(line, highlight=False)
    if arguments.dry_run:
        for name in study.names():
            console.print(name, highlight=False)
        return 0
    train_on_without_output()
    command = shlex.join(["megapoly", "compare", *given])
    record = ComparisonRecord.of(study.output, command=command, config=arguments.config)
    chosen = study.run(record, console)
    show_tables(study.output, REFERENCE, console)
    lost = [variant.name for variant in variants if variant not in chosen]
    if lost:
        console.print(
            f"\nThe loss of {', '.join(lost)} was not finite with every seed at any of the "
            "learning rates. Add lower `--learning-rates`, or use a longer warm-up in another "
            "`--output`.",
            highlight=False,
        )
    return 0


def _shares(arguments: argparse.Namespace) -> tuple[int, dict[str, str]]:
    """Return the number of jobs at the same time, and variables that share the cores."""
    from megapoly.preflight.doctor.facts import system_facts

    if arguments.launcher is not None:
        return arguments.jobs or 1, {}
    cores, processes = system_facts().cores, arguments.nproc_per_node or 1
    at_once = arguments.jobs or max(1, cores // processes)
    if "OMP_NUM_THREADS" in os.environ:
        return at_once, {}
    return at_once, {"OMP_NUM_THREADS": str(max(1, cores // (at_once * processes)))}


def _base(
    arguments: argparse.Namespace, overrides: Sequence[str], variants: Sequence[Variant]
) -> Config:
    """Return the configuration of all runs; check it before the first run starts."""
    from megapoly.config.parsing import parse
    from megapoly.config.resolve import least_world_size
    from megapoly.config.rules import find_problems
    from megapoly.data.tokenizer import tokenizer_vocab_size
    from megapoly.platform.device import this_machine
    from megapoly.platform.machine import Machine
    from megapoly.study.comparison.trials import (
        Trial,
        options_of_some,
        with_own_options,
        with_tasks,
    )

    recipes = [each for path in arguments.config for each in ("--config", path)]
    program = Path(sys.argv[0]).name
    base = parse([*recipes, *overrides], default_recipe=arguments.config[0], program=program).config
    vocab_size = tokenizer_vocab_size(base.data.tokenizer)
    here = arguments.launcher is None
    problems_of = partial(
        find_problems,
        world_size=arguments.nproc_per_node or 1 if here else least_world_size(base),
        # Elsewhere assume everything that a configuration may require.
        machine=this_machine() if here else Machine(True, transformer_engine=True, apex=True),
        tokenizer_vocab_size=vocab_size,
        with_files=here,
    )
    # Trials are made from a valid one, which may set options that only some activations have.
    if problems := problems_of(with_own_options(base)):
        raise ConfigError(problems)
    options_of_some(base, variants)
    if arguments.tasks:
        base = with_tasks(base, arguments.tasks, arguments.task_data, arguments.task_limit)
    trials = [Trial(v, base.optimizer.lr, seed) for v in variants for seed in arguments.seeds]
    problems = [p for trial in trials for p in problems_of(trial.config(base, arguments.output))]
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    base.model.vocab_size = base.model.vocab_size or vocab_size
    if base.model.vocab_size is None:
        raise ConfigError(
            [f"`data.tokenizer` ({base.data.tokenizer}) is missing; set `--model.vocab_size`"]
        )
    return base


def _launcher(arguments: argparse.Namespace) -> list[str]:
    if arguments.launcher is None:
        num_processes = str(arguments.nproc_per_node or 1)
        train = [sys.executable, "-m", "megapoly", "train"]
        return [*train, "--nproc-per-node", num_processes]
    try:
        launcher = shlex.split(arguments.launcher)
    except ValueError as error:
        raise ConfigError([f"`--launcher` ({arguments.launcher}): {error}"]) from error
    if not launcher or shutil.which(launcher[0]) is None:
        raise ConfigError(
            [
                f"`--launcher` ({arguments.launcher}) must begin with a program of this machine; "
                "give its path, or install it"
            ]
        )
    return launcher
