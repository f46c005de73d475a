r"""Compare activations: the same model, data order, tokens and number of parameters for each.

    megapoly compare --config dense_miniature \
        --config runs/paper/data/data.yaml --output runs/paper/dense \
        --activations swiglu gelu relu polyrelu polynorm --learning-rates 4e-3 8e-3 --seeds 1 2 3

With several --learning-rates every activation is trained at each with the first seed, and with the
other seeds at the rate that gave it the lowest validation loss, and at those that came within
--margin of it, which one seed cannot tell apart. Of these the best over all seeds is the
activation's; a rate at which the loss becomes infinite or NaN has lost. A seed decides initial
weights and the order of the data, so that activations are compared on the same samples.
`polyrelu:4` is polyrelu of order 4; --orders 2 3 4 takes these of all polynomial activations named
without one.

Runs are the folders OUTPUT/ACTIVATION.lr_RATE.seed_SEED; the same command goes on where it was
stopped. In the end tables of OUTPUT's runs are shown, with differences to swiglu if it is there;
megapoly report makes the page, megapoly analyze looks into the models.

--jobs run at a time, each with --nproc-per-node processes on this machine, or by --launcher on
others:

    --jobs 5 --launcher 'sbatch --wait --nodes 4 examples/slurm/pretrain.sbatch
        examples/pretrain_dense.sh'

Stopped by Ctrl-C or SIGTERM it passes SIGTERM to the jobs and waits until they have saved. That
ends `sbatch --wait`, but not its job: cancel it before the same command is given again.

Options of the configuration, `--section.field value`, are for all runs. The exit status is 0; 2
with the reason, also where runs failed.
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
    number,
    parse_with_overrides,
    status_of,
    whole,
)
from megapoly.errors import ConfigError
from megapoly.platform.logs import show_errors_only
from megapoly.polynomial import ORDERS

if TYPE_CHECKING:
    from megapoly.config import Config
    from megapoly.study.comparison.trials import Variant

# What the others are compared with, where it is among them.
REFERENCE = "swiglu"
# Options of the configuration that trials are told apart by, and what sets them.
SET_BY_TRIALS = {
    "model.activation": "--activations",
    "model.activation_order": "--orders",
    "training.seed": "--seeds",
    "data.seed": "--seeds",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Compare; see the module for the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = build_parser()
    arguments, overrides = parse_with_overrides(parser, words)
    _check_options(parser, arguments, overrides)
    show_errors_only()
    return status_of(lambda: _compare(arguments, overrides, words))


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
        help="name or YAML file; several: later ones go before earlier ones",
    )
    add("--output", required=True, type=Path, metavar="FOLDER", help="of all runs")
    add("--activations", nargs="+", required=True, metavar="NAME", help="NAME or NAME:ORDER")
    add(
        "--orders",
        nargs="+",
        type=int,
        choices=ORDERS,
        metavar="R",
        help="2, 3, 4 (3)",
    )
    add("--seeds", nargs="+", type=whole(0), default=[1], metavar="N", help="(1)")
    add(
        "--learning-rates",
        nargs="+",
        type=rate,
        metavar="X",
        help="grid (the configuration's alone); optimizer.min_lr keeps its ratio",
    )
    add(
        "--margin",
        type=number(least=0.0, most=100.0),
        default=0.0,
        metavar="LOSS",
        help="take the other seeds to rates so near to the best, too (0)",
    )
    add(
        "--jobs",
        type=whole(1),
        metavar="N",
        help="runs at a time (cores / processes; with --launcher 1)",
    )
    add("--nproc-per-node", type=whole(1), metavar="N", help="of each run, here (1)")
    add("--launcher", metavar="COMMAND", help="starts a run, given --config FILE behind it")
    add("--tasks", nargs="+", metavar="NAME", help="benchmarks after the last step")
    add("--task-data", metavar="FOLDER", help="questions, as megapoly evaluate takes them")
    add("--task-limit", type=whole(1), metavar="N", help="questions of each task (all)")
    add("--dry-run", action="store_true", help="check, and list the runs")
    return parser


def _check_options(parser: Parser, arguments: argparse.Namespace, overrides: Sequence[str]) -> None:
    """End with a message at options that nothing reads, or that contradict each other."""
    set_by = SET_BY_TRIALS | (
        {"optimizer.lr": "--learning-rates"} if arguments.learning_rates else {}
    )
    for word in overrides:
        name = word.removeprefix("--").partition("=")[0]
        if name in set_by:
            parser.error(f"--{name} is set by {set_by[name]}; leave it out")
    if not arguments.tasks and (arguments.task_data or arguments.task_limit):
        parser.error("--task-data and --task-limit are for --tasks; name tasks, or leave them out")
    if arguments.margin and not (len(arguments.learning_rates or ()) > 1 < len(arguments.seeds)):
        parser.error("--margin is for several --learning-rates and --seeds; leave it out")
    if arguments.launcher is not None and arguments.nproc_per_node:
        parser.error(
            "--nproc-per-node is for runs on this machine; the --launcher says how many it takes"
        )
    # Of rates as they stand in the folders' names, which have six digits.
    rates = [f"{rate:g}" for rate in arguments.learning_rates or ()]
    for option, names in (("--seeds", arguments.seeds), ("--learning-rates", rates)):
        if len(set(names)) < len(names):
            parser.error(f"{option}: each must be named once, not {' '.join(map(str, names))}")


def _compare(arguments: argparse.Namespace, overrides: Sequence[str], words: list[str]) -> int:
    # Here and not above: --help answers at once.
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
    command = shlex.join(["megapoly", "compare", *words])
    record = ComparisonRecord.of(study.output, command=command, config=arguments.config)
    chosen = study.run(record, console)
    show_tables(study.output, REFERENCE, console)
    lost = [variant.name for variant in variants if variant not in chosen]
    if lost:
        console.print(
            f"\nThe loss of {', '.join(lost)} did not stay finite with every seed at any of the "
            "learning rates. Add lower `--learning-rates`, or give a longer warm-up in another "
            "`--output`.",
            highlight=False,
        )
    return 0


def _shares(arguments: argparse.Namespace) -> tuple[int, dict[str, str]]:
    """Jobs at a time, and variables that share this machine's cores among them."""
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
    """Configuration of all runs; what runs would refuse is told before the first."""
    from megapoly.config.parsing import parse
    from megapoly.config.resolve import least_world_size
    from megapoly.config.rules import find_problems
    from megapoly.data.tokenizer import tokenizer_vocab_size
    from megapoly.platform.device import this_machine
    from megapoly.platform.machine import Machine
    from megapoly.study.comparison.trials import Trial, with_tasks

    recipes = [word for path in arguments.config for word in ("--config", path)]
    program = Path(sys.argv[0]).name
    base = parse([*recipes, *overrides], default_recipe=arguments.config[0], program=program).config
    vocab_size = tokenizer_vocab_size(base.data.tokenizer)
    here = arguments.launcher is None
    problems_of = partial(
        find_problems,
        world_size=arguments.nproc_per_node or 1 if here else least_world_size(base),
        # Elsewhere whatever a configuration may ask for.
        machine=this_machine() if here else Machine(True, transformer_engine=True, apex=True),
        tokenizer_vocab_size=vocab_size,
        with_files=here,
    )
    if problems := problems_of(base):  # trials are made of one that obeys the rules
        raise ConfigError(problems)
    if arguments.tasks:
        base = with_tasks(base, arguments.tasks, arguments.task_data, arguments.task_limit)
    trials = [Trial(v, base.optimizer.lr, seed) for v in variants for seed in arguments.seeds]
    problems = [p for trial in trials for p in problems_of(trial.config(base, arguments.output))]
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    base.model.vocab_size = base.model.vocab_size or vocab_size
    if base.model.vocab_size is None:
        raise ConfigError(
            [f"`data.tokenizer` ({base.data.tokenizer}) is not here; set `--model.vocab_size`"]
        )
    return base


def _launcher(arguments: argparse.Namespace) -> list[str]:
    if arguments.launcher is None:
        num_processes = str(arguments.nproc_per_node or 1)
        train = [sys.executable, "-m", "megapoly", "train"]
        return [*train, "--nproc-per-node", num_processes]
    try:
        words = shlex.split(arguments.launcher)
    except ValueError as error:
        raise ConfigError([f"`--launcher` ({arguments.launcher}): {error}"]) from error
    if not words or shutil.which(words[0]) is None:
        raise ConfigError(
            [
                f"`--launcher` ({arguments.launcher}) must begin with a program that is here; give "
                "its path, or install it"
            ]
        )
    return words
