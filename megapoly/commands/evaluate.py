r"""Evaluate a model: benchmarks by the LM Evaluation Harness, perplexity of text by domain.

    megapoly evaluate --model exported --tasks paper --task-data benchmarks --json out.json
    megapoly evaluate --model runs/moe_tiny --tasks table1 coqa --task-data benchmarks
    megapoly evaluate --model runs/moe_tiny --perplexity --data.validation "{wiki: tokens/w}"
    torchrun --nproc-per-node 2 -m megapoly evaluate --model runs/moe_tiny --tasks table1 \
        --task-data benchmarks --perplexity --parallel.tensor_model_parallel_size 2

MODEL is a Hugging Face folder, a checkpoint `iter_*` of any parallel layout, or a run (its newest
checkpoint). Tasks are groups (table1, table3, paper), names of docs/how-to/evaluate.md, or
any task, group or tag of the harness, separated by commas or spaces. With --task-data questions
come from a folder that megapoly export-benchmarks writes, without it from the Hugging Face hub or
its cache.

One process converts a checkpoint in memory and runs every task. Several, started by torchrun, share
the model by --parallel.* and run the tasks that score answers; those that generate text are refused
there. The figures are the same.

--perplexity takes a checkpoint, and the validation sets of its configuration or of
--data.validation. It and several processes read options of the configuration,
`--section.field value`.

The exit status is 0, or 2 with the reason.
"""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Sequence
from pathlib import Path

from megapoly.config.command_line import Parser, parse_with_overrides
from megapoly.errors import MegapolyError
from megapoly.evaluation.command import DEFAULT_BATCH_SIZE, evaluate
from megapoly.evaluation.library_logging import quieten_libraries
from megapoly.evaluation.models import DTYPES
from megapoly.evaluation.request import EvaluationRequest
from megapoly.platform import launcher
from megapoly.pretrain import quieten


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate; see the module for the exit status."""
    is_first_of_host = launcher.local_rank() == 0
    asked = _parse(argv, silent=not is_first_of_host)
    _prepare_libraries()
    try:
        evaluate(asked)
    except MegapolyError as error:
        # Once for each host: a file may be missing on one of them alone.
        if is_first_of_host:
            print(error, file=sys.stderr)
        return 2
    return 0


def _parse(argv: Sequence[str] | None, *, silent: bool) -> EvaluationRequest:
    parser = build_parser()
    with contextlib.ExitStack() as stack:
        if silent:
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
            stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        options, words = parse_with_overrides(parser, argv)
    options.tasks = tuple(name for word in options.tasks for name in word.split(",") if name)
    return EvaluationRequest(**vars(options), words=tuple(words))


def build_parser() -> Parser:
    """Return the command's parser."""
    parser = Parser(
        "evaluate",
        __doc__,
        usage="%(prog)s --model MODEL (--tasks NAME ... | --perplexity) [options]",
    )
    add = parser.add_argument
    add("--model", type=Path, required=True, help="Hugging Face folder, checkpoint or run")
    add("--tasks", nargs="+", default=[], metavar="NAME", help="groups and tasks")
    add("--perplexity", action="store_true", help="loss and perplexity of each validation set")
    add("--task-data", type=Path, help="folder with the questions; nothing is downloaded")
    add("--skip-missing", action="store_true", help="leave out tasks that --task-data lacks")
    add("--limit", type=int, help="only the first so many questions of each task")
    add("--num-fewshot", type=int, help="answered examples before each question, all tasks")
    add(
        "--batch-size",
        type=int,
        help=f"sequences of tasks at a time, of each process (default: {DEFAULT_BATCH_SIZE})",
    )
    add(
        "--add-bos",
        action="store_true",
        help="put before every text of a task what the tokenizer puts there, such as <s> (default: "
        "not for models trained here, as the tokenizer has it for others)",
    )
    add("--dtype", choices=DTYPES, default="auto", help="auto: as stored (default: %(default)s)")
    add("--device", help="as torch names it (default: cuda if there is one, else cpu)")
    add("--json", type=Path, help="write all figures to this file")
    return parser


def _prepare_libraries() -> None:
    """Set up what they read when they are imported, which happens later."""
    quieten_libraries()
    quieten(is_first=launcher.rank() == 0)
