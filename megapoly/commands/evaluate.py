r"""Evaluate a model: accuracy on benchmarks, perplexity of text by domain, or both.

    megapoly evaluate --model runs/moe_tiny --perplexity
    megapoly evaluate --model exported --tasks paper --task-data benchmarks --output out.json
    megapoly evaluate --model runs/moe_tiny --tasks table1 coqa --task-data benchmarks
    megapoly evaluate --model runs/moe_tiny --perplexity --data.validation "{wiki: tokens/w}"
    torchrun --nproc-per-node 2 -m megapoly evaluate --model runs/moe_tiny --tasks table1 \
        --task-data benchmarks --perplexity --parallel.tensor_model_parallel_size 2

MODEL is a run (its newest checkpoint), a checkpoint `iter_*` of any parallel layout, or a Hugging
Face folder, whose own code runs only with --trust-remote-code. A run or checkpoint in an object
store, such as s3://bucket/moe_tiny, is copied to ~/.cache/megapoly on each host and verified.

--tasks runs benchmarks with the LM Evaluation Harness and needs `pip install 'megapoly[eval]'`.
NAMEs are groups (table1, table3, paper), tasks of the paper such as piqa, or any task, group or tag
of the harness, separated by commas or spaces. With --task-data, questions come from a folder that
`megapoly export-benchmarks` writes; without it, from the Hugging Face hub or its cache.

--perplexity measures loss and perplexity on the validation sets of the checkpoint's configuration,
or of --data.validation. It needs a checkpoint and `pip install 'megapoly[train]'`.

One process converts a checkpoint in memory for the tasks. Several processes, started by torchrun,
share the model by --parallel.* and give the same figures, but cannot run tasks that generate text
(coqa). Several processes and --perplexity take options of the configuration as
`--section.field value`.

The exit status is 0, or 2 with the reason.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
from collections.abc import Sequence
from pathlib import Path

from megapoly.config.command_line import (
    Parser,
    add_trust_option,
    at_least,
    parse_with_overrides,
    path_or_url,
)
from megapoly.config.ranges import LARGEST_COUNT
from megapoly.errors import MegapolyError
from megapoly.evaluation.request import DEFAULT_BATCH_SIZE, DTYPES, EvaluationRequest
from megapoly.platform import launcher
from megapoly.platform.logs import configure_logging, silence_evaluation_libraries


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate a model; the module describes the exit status."""
    is_first_of_host = launcher.local_rank() == 0
    request = _parse(argv, silent=not is_first_of_host)
    _prepare_libraries()
    # Here and not above: --help answers without waiting for torch.
    from megapoly.evaluation.command import evaluate

    try:
        evaluate(request)
    except MegapolyError as error:
        # Once per host: a file may be missing on only one of them.
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
        options, overrides = parse_with_overrides(parser, argv)
    options.tasks = tuple(name for names in options.tasks for name in names.split(",") if name)
    return EvaluationRequest(**vars(options), overrides=tuple(overrides))


def build_parser() -> Parser:
    """Return the command's parser."""
    parser = Parser(
        "evaluate",
        __doc__,
        earlier={"--json": "--output"},
        usage="%(prog)s --model MODEL (--tasks NAME ... | --perplexity) [options] "
        "[--section.field value ...]",
    )
    add = parser.add_argument
    whole = at_least(-LARGEST_COUNT)  # the request has the ranges, and reports all that are left
    add(
        "--model",
        type=path_or_url,
        required=True,
        help="run or checkpoint, folder or URL, or Hugging Face folder",
    )
    add("--tasks", nargs="+", default=[], metavar="NAME", help="groups and tasks to run")
    add("--perplexity", action="store_true", help="measure perplexity of each validation set")
    add("--output", type=Path, metavar="FILE", help="write all figures to this JSON file")
    add("--task-data", type=Path, metavar="DIR", help="folder with the questions of the tasks")
    add("--skip-missing", action="store_true", help="skip tasks whose questions DIR lacks")
    add("--limit", type=whole, metavar="N", help="use only the first N questions of each task")
    add(
        "--num-fewshot",
        type=whole,
        metavar="N",
        help="answered examples before each question (default: the number of each task)",
    )
    add(
        "--batch-size",
        type=whole,
        metavar="N",
        help=f"sequences of tasks per forward pass and process (default: {DEFAULT_BATCH_SIZE})",
    )
    add(
        "--add-bos",
        action=argparse.BooleanOptionalAction,
        help="begin every text of a task with the token that the tokenizer puts there, such as <s> "
        "(default: an imported checkpoint records it; not for models trained here; for others the "
        "tokenizer decides)",
    )
    add_trust_option(parser)
    add("--dtype", choices=DTYPES, default="auto", help="dtype to compute in (default: as stored)")
    add("--device", help="device such as cpu or cuda (default: cuda if available, else cpu)")
    return parser


def _prepare_libraries() -> None:
    """Set what libraries read when they are imported, which happens later."""
    silence_evaluation_libraries()
    configure_logging(is_rank_zero=launcher.rank() == 0)
