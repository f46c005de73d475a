"""Accuracy of a model on the paper's benchmarks, by the LM Evaluation Harness.

    python tools/evaluate.py --model exported/ --tasks paper --task-data benchmarks/ --json out.json

Tasks are groups (table1, table3, paper), names of megapoly/evaluation/README.md, or any task, group
or tag of the harness, separated by commas or spaces. With --task-data questions come from a folder
that tools/export_benchmarks.py writes, without it from the Hugging Face hub or its cache. The exit
status is 0, or 2 with the reason.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from megapoly.errors import EvaluationError, MegapolyError
from megapoly.evaluation.following import OnProgress
from megapoly.evaluation.harness import evaluate_tasks
from megapoly.evaluation.models import DTYPES, open_model
from megapoly.evaluation.results import write_json
from megapoly.evaluation.table import show_results
from megapoly.evaluation.tasks import select


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate; see the module for the exit status."""
    options = _parser().parse_args(argv)
    _prepare_libraries()
    try:
        return _evaluate(options)
    except MegapolyError as error:
        print(error, file=sys.stderr)
        return 2


def _evaluate(options: argparse.Namespace) -> int:
    console, messages = Console(), Console(stderr=True)
    selection = select(name for word in options.tasks for name in word.split(",") if name)
    if options.json:
        _check_writable(options.json)
    device = options.device or _default_device()
    messages.print(f"{options.model} on {device}", highlight=False, markup=False, soft_wrap=True)
    lm = open_model(
        options.model, dtype=options.dtype, device=device, batch_size=options.batch_size
    )
    with _bar(messages) as on_progress:
        results = evaluate_tasks(
            lm,
            selection,
            limit=options.limit,
            task_data=options.task_data,
            num_fewshot=options.num_fewshot,
            skip_missing=options.skip_missing,
            on_progress=on_progress,
        )
    if results is None:
        return 0
    show_results(results, options.model.resolve().name, console)
    if options.json:
        model = {
            "path": str(options.model.resolve()),
            "dtype": options.dtype,
            "device": device,
            "batch_size": options.batch_size,
        }
        write_json(options.json, results, model)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", type=Path, required=True, help="folder in Hugging Face's format")
    add("--tasks", nargs="+", required=True, help="groups and tasks")
    add("--task-data", type=Path, help="folder with the questions; nothing is downloaded")
    add("--skip-missing", action="store_true", help="leave out tasks that --task-data lacks")
    add("--limit", type=int, help="only the first so many questions of each task")
    add("--num-fewshot", type=int, help="answered examples before each question, all tasks")
    add("--batch-size", type=int, default=8, help="sequences at a time (default: %(default)s)")
    add("--dtype", choices=DTYPES, default="auto", help="auto: as stored (default: %(default)s)")
    add("--device", help="as torch names it (default: cuda if there is one, else cpu)")
    add("--json", type=Path, help="write all figures to this file")
    return parser


def _check_writable(path: Path) -> None:
    """An evaluation can take hours, and would end with its figures lost."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a").close()
    except OSError as error:
        raise EvaluationError(f"`--json` ({path}) cannot be written: {error.strerror}") from error


def _default_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


@contextmanager
def _bar(console: Console) -> Iterator[OnProgress]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("reading the tasks", total=None)

        def on_progress(answered: int, total: int) -> None:
            progress.update(bar, completed=answered, total=total, description="answers scored")

        yield on_progress


def _prepare_libraries() -> None:
    """Set up what they read when they are imported, which happens later."""
    # The harness imports a package of this file's name, `evaluate`, for some metrics.
    here = Path(__file__).resolve().parent
    sys.path[:] = [path for path in sys.path if Path(path).resolve() != here]
    # One bar for everything stands in the place of the libraries' own, several a task.
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", module="transformers|datasets|torch")
    for name in ("transformers", "datasets", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)


if __name__ == "__main__":
    sys.exit(main())
