r"""Compare activations: the same model, data order, tokens and number of parameters for each.

    python tools/compare_activations.py --config examples/configs/paper/dense_tiny.yaml \
        --config runs/paper/data/data.yaml --output runs/paper/dense \
        --activations swiglu gelu relu polyrelu polynorm --learning-rates 4e-3 8e-3 --seeds 1 2 3

With several --learning-rates every activation is trained at each with the first seed, and with the
other seeds at the rate that gave it the lowest validation loss. `polyrelu:4` is polyrelu of order
4; --orders 2 3 4 takes these of all polynomial activations named without one. A seed decides
initial weights and the order of the data, so that activations are compared on the same samples.

Runs are the folders OUTPUT/ACTIVATION.lr_RATE.seed_SEED; the same command goes on where it was
stopped. In the end tables of losses and perplexities are shown; tools/report.py makes the page,
tools/analyze.py looks into the models.

--jobs run at a time, each with --processes processes on this machine, or by --launcher on others:

    --jobs 5 --launcher 'sbatch --wait --nodes 4 examples/slurm/pretrain.sbatch
        examples/pretrain_dense.sh'

Options of the configuration, `--section.field value`, are for all runs. The exit status is 0; 2
with the reason, also where runs failed.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from command_line import number, parser_of, quieten, run, status_of, whole
from rich.console import Console

from megapoly.errors import ConfigError

if TYPE_CHECKING:
    from megapoly.comparison.trials import Variant
    from megapoly.config import Config

ROOT = Path(__file__).resolve().parents[1]
# What the others are compared with, where it is among them.
REFERENCE = "swiglu"


def main(argv: Sequence[str] | None = None) -> int:
    """Compare; see the module for the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    arguments, overrides = _parser().parse_known_args(words)
    unknown = [word for word in overrides if word.startswith("-") and "." not in word]
    if unknown:
        _parser().error(f"unrecognized arguments: {' '.join(unknown)}")
    quieten()
    return status_of(lambda: _compare(arguments, overrides, words))


def _parser() -> argparse.ArgumentParser:
    parser = parser_of(__doc__)
    add = parser.add_argument
    rate = number(above=0.0, most=1.0)
    add(
        "--config",
        action="append",
        required=True,
        type=Path,
        metavar="FILE",
        help="recipe; several: later ones go before earlier ones",
    )
    add("--output", required=True, type=Path, metavar="FOLDER", help="of all runs")
    add("--activations", nargs="+", required=True, metavar="NAME", help="NAME or NAME:ORDER")
    add(
        "--orders",
        nargs="+",
        type=int,
        choices=(2, 3, 4),
        default=[3],
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
    add("--jobs", type=whole(1), metavar="N", help="runs at a time (cores / processes)")
    add("--processes", type=whole(1), default=1, metavar="N", help="of each run, here (1)")
    add("--launcher", metavar="COMMAND", help="starts a run, given --config FILE behind it")
    add("--tasks", nargs="+", metavar="NAME", help="benchmarks after the last step")
    add("--task-data", metavar="FOLDER", help="questions, as tools/evaluate.py takes them")
    add("--task-limit", type=whole(1), metavar="N", help="questions of each task (all)")
    add("--dry-run", action="store_true", help="check, and list the runs")
    return parser


def _compare(arguments: argparse.Namespace, overrides: Sequence[str], words: list[str]) -> int:
    # Here and not above: --help answers at once.
    from megapoly.comparison import trials
    from megapoly.comparison.record import Record
    from megapoly.comparison.study import Study
    from megapoly.report.terminal import show_tables

    variants = trials.parse_variants(arguments.activations, arguments.orders)
    base = _base(arguments, overrides, variants)
    trials.check_comparable(base, variants)
    cores = os.cpu_count() or 1
    at_once = arguments.jobs or max(1, cores // arguments.processes)
    threads = max(1, cores // (at_once * arguments.processes))
    study = Study(
        base=base,
        variants=variants,
        rates=arguments.learning_rates or [base.optimizer.lr],
        seeds=arguments.seeds,
        output=arguments.output,
        launcher=_launcher(arguments, base),
        at_once=at_once,
        environment={} if arguments.launcher else {"OMP_NUM_THREADS": str(threads)},
    )
    console = Console()
    for line in trials.describe(base, variants):
        console.print(line, highlight=False)
    if arguments.dry_run:
        for name in study.names():
            console.print(name, highlight=False)
        return 0
    command = shlex.join(["python", "tools/compare_activations.py", *words])
    record = Record.of(study.output, command=command, config=[str(c) for c in arguments.config])
    study.run(record, console)
    show_tables(study.output, REFERENCE, console)
    return 0


def _base(
    arguments: argparse.Namespace, overrides: Sequence[str], variants: Sequence[Variant]
) -> Config:
    """Configuration of all runs; what runs here is checked for each variant before the first."""
    from megapoly.comparison.trials import Trial, with_tasks
    from megapoly.config.parsing import parse
    from megapoly.config.rules import find_problems
    from megapoly.config.startup import tokenizer_vocab_size
    from megapoly.platform.device import this_machine

    recipes = [word for path in arguments.config for word in ("--config", str(path))]
    program = Path(sys.argv[0]).name
    base = parse([*recipes, *overrides], default_recipe=arguments.config[0], program=program).config
    vocab_size = tokenizer_vocab_size(base)
    here = arguments.launcher is None
    problems = [
        problem
        for variant in variants
        for problem in find_problems(
            Trial(variant, base.optimizer.lr, 0).config(base, arguments.output),
            world_size=arguments.processes,
            machine=this_machine(),
            tokenizer_vocab_size=vocab_size,
        )
        if here
    ]
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    base.model.vocab_size = base.model.vocab_size or vocab_size
    if base.model.vocab_size is None:
        raise ConfigError(
            [f"`data.tokenizer` ({base.data.tokenizer}) is not here; set `--model.vocab_size`"]
        )
    if arguments.tasks:
        limit = arguments.task_limit
        base = with_tasks(base, arguments.tasks, arguments.task_data, limit)
    return base


def _launcher(arguments: argparse.Namespace, base: Config) -> list[str]:
    if arguments.launcher is not None:
        return shlex.split(arguments.launcher)
    kind = "moe" if base.model.num_moe_experts else "dense"
    return [
        sys.executable,
        "-m",
        "megapoly.launch",
        "--standalone",
        "--nproc-per-node",
        str(arguments.processes),
        str(ROOT / "examples" / f"pretrain_{kind}.sh"),
    ]


if __name__ == "__main__":
    run(main)
