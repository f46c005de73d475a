"""Pre-train a model, or resume a run from its newest checkpoint.

    megapoly train --config moe_tiny
    megapoly train --config dense_1b_paper --nproc-per-node 8 --run_dir runs/dense_1b
    torchrun --nproc-per-node 8 -m megapoly train --config moe_7b_paper

--nproc-per-node starts that many processes on this machine. Under torchrun, `megapoly launch` or
another launcher, which starts the processes itself, the option is refused.

The exit status is 0 when the run is complete or was requested to stop (Ctrl-C and SIGTERM save
first), 2 when the configuration, the data or a checkpoint cannot be used, 3 when the loss is not
finite, or has more spikes than training.spike_action allows.
"""

from __future__ import annotations

import sys
from argparse import SUPPRESS, RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from textwrap import fill

from jsonargparse import ArgumentParser

from megapoly import pretrain
from megapoly.commands import end_on_signals
from megapoly.config.options import short
from megapoly.config.parsing import option_parser
from megapoly.config.ranges import MOST_PROCESSES, Range, whole_number
from megapoly.platform import launcher

_PROCESSES = "--nproc-per-node"


def main(argv: Sequence[str]) -> int:
    """Train, and return the exit status; see the module."""
    try:
        num_processes, rest = _take_processes(argv)
    except ValueError as error:
        print(f"megapoly train: {error}", file=sys.stderr)
        return 2
    if "-h" in rest or "--help" in rest:
        print(build_parser().format_help(), end="")
        return 0
    if num_processes is None:
        work: Callable[[], int] = lambda: pretrain.main(rest, program="megapoly train")  # noqa: E731
        return work() if launcher.is_launched() else end_on_signals(work)
    from megapoly.commands import launch

    return launch.main(
        ["--standalone", _PROCESSES, str(num_processes), "-m", "megapoly", "train", *rest]
    )


def build_parser() -> ArgumentParser:
    """Return a parser of all options, for help, completion and documentation."""
    parser = option_parser("megapoly train", pretrain.DEFAULT_RECIPE)
    parser.formatter_class = RawDescriptionHelpFormatter
    options = fill(parser.description or "", width=100)
    parser.description = f"{__doc__}\n{options}"
    parser.add_argument(
        _PROCESSES, metavar="N", default=SUPPRESS, help="processes to start on this machine"
    )
    return parser


def _take_processes(argv: Sequence[str]) -> tuple[int | None, list[str]]:
    """Split off the number of processes to start; None if this process trains itself."""
    rest, given = list(argv), None
    for i, argument in enumerate(rest):
        flag, equals, text = argument.partition("=")
        if flag.replace("_", "-") == _PROCESSES:
            given = text if equals else "".join(rest[i + 1 : i + 2])
            del rest[i : i + (1 if equals else 2)]
            break
    if given is None:
        return None, rest
    if launcher.is_launched():
        raise ValueError(
            f"{_PROCESSES} ({given}) cannot be used here: a launcher has started the processes of "
            "this job; leave it out, or give it to the launcher"
        )
    number = whole_number(given, Range(1, MOST_PROCESSES))
    if number is None:
        raise ValueError(
            f"{_PROCESSES} ({short(given)}) must be a number of processes, 1 to {MOST_PROCESSES}"
        )
    return number, rest
