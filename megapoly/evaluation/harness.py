"""Run benchmarks on a model with the LM Evaluation Harness."""

from __future__ import annotations

import importlib.metadata
import tempfile
import time
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megapoly import __version__
from megapoly.errors import EvaluationError, UnavailableError
from megapoly.evaluation.harness_progress import HarnessWarnings, report_answers
from megapoly.evaluation.harness_results import collect_results
from megapoly.evaluation.local_tasks import missing_files, write_task_files
from megapoly.evaluation.results import Skipped, TaskResults
from megapoly.evaluation.squad_metrics import squad_metrics_importable
from megapoly.evaluation.tasks import TASKS, EvalTask, Selection, unknown_task
from megapoly.platform.progress import OnProgress

if TYPE_CHECKING:
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager

# The harness's own defaults, so that its command gives the same figures.
SEEDS = {"random": 0, "numpy": 1234, "torch": 1234, "fewshot": 1234}
_LIBRARIES = ("lm_eval", "transformers", "torch", "datasets", "tokenizers", "numpy")


def evaluate_tasks(
    lm: LM,
    selection: Selection,
    *,
    limit: int | None = None,
    task_data: Path | None = None,
    num_fewshot: int | None = None,
    skip_missing: bool = False,
    on_progress: OnProgress | None = None,
) -> TaskResults | None:
    """Run tasks on a model; collective where ``lm`` is.

    The same model, tasks and options give the same figures. The harness seeds the global random
    generators.

    Args:
        lm: any model of the harness. In a job of several processes each passes its own and the
            same other arguments.
        selection: the tasks.
        limit: number of questions per task (for MMLU per subject), from the first; None for all.
        task_data: folder with the questions (:mod:`megapoly.evaluation.local_tasks`); None for
            the harness's own source, the Hugging Face hub or its cache.
        num_fewshot: answered examples before each question, for all tasks.
        skip_missing: skip tasks whose files are missing in ``task_data``; the result lists them.
        on_progress: called with the numbers of answered requests and of all requests; a request is
            one answer to score or one text to generate. Needs a model that reports its answers
            (``LM.cache_hook``).

    Returns:
        The results; None in processes to which the harness gives none: all but the first rank of an
        ``lm`` that has ranks, else all whose LOCAL_RANK is not 0.

    Raises:
        EvaluationError: a task is unknown or runs the model's answers as programs, data is missing
            or cannot be loaded, or ``limit`` or ``num_fewshot`` is out of range.
        UnavailableError: the harness is not installed, or a task generates text and ``lm`` cannot
            (``lm.refuses_generation`` is the reason).
    """
    _check_numbers(limit, num_fewshot)
    lm_eval = import_harness()
    started, date = time.monotonic(), datetime.now(timezone.utc).isoformat(timespec="seconds")
    tasks, skipped = available_tasks(selection, task_data, skip_missing)
    with (
        HarnessWarnings() as warnings,
        tempfile.TemporaryDirectory(prefix="megapoly-tasks-") as folder,
    ):
        names = write_task_files(tasks, Path(folder), task_data)
        manager = _task_manager(tasks, Path(folder))
        with squad_metrics_importable():
            loaded = {
                task: _load(manager, name, task, task_data is not None)
                for task, name in zip(tasks, names, strict=True)
            }
        for task, members in loaded.items():
            _set_fewshot(members, task.num_fewshot if num_fewshot is None else num_fewshot)
        leaves = [leaf for members in loaded.values() for leaf in members["tasks"].values()]
        _check_duplicates(leaves)
        _check_generation(lm, loaded)
        _check_programs(leaves)
        warnings.clear()  # about defaults that the task files leave to the harness
        with report_answers(lm, leaves, on_progress):
            raw = lm_eval.simple_evaluate(
                lm,
                tasks=[top for members in loaded.values() for top in _top_level(members)],
                limit=limit,
                log_samples=False,
                task_manager=manager,
                random_seed=SEEDS["random"],
                numpy_random_seed=SEEDS["numpy"],
                torch_random_seed=SEEDS["torch"],
                fewshot_random_seed=SEEDS["fewshot"],
            )
    if raw is None:
        return None
    results = tuple(
        result for task in tasks for result in collect_results(raw, task, loaded[task], limit)
    )
    return TaskResults(
        selection=selection,
        tasks=results,
        skipped=skipped,
        limit=limit,
        warnings=warnings.collected(),
        seeds=SEEDS,
        versions={"megapoly": __version__}
        | {name: importlib.metadata.version(name) for name in _LIBRARIES},
        date=date,
        seconds=time.monotonic() - started,
    )


def _check_numbers(limit: int | None, num_fewshot: int | None) -> None:
    if limit is not None and limit < 1:
        raise EvaluationError(f"`limit` ({limit}) must be at least 1; leave it out for all")
    if num_fewshot is not None and num_fewshot < 0:
        raise EvaluationError(f"`num_fewshot` ({num_fewshot}) must not be negative")


def import_harness() -> Any:
    """Import the harness.

    Raises:
        UnavailableError: it is not installed.
    """
    try:
        import lm_eval
    except ImportError as error:
        raise UnavailableError(
            f"Tasks need the LM Evaluation Harness ({error}): pip install 'megapoly[eval]'"
        ) from error
    return lm_eval


def available_tasks(
    selection: Selection, task_data: Path | None, skip_missing: bool
) -> tuple[list[EvalTask], tuple[Skipped, ...]]:
    """Return the tasks that can run, and the tasks whose files are missing in the folder.

    Raises:
        EvaluationError: the folder does not exist, lacks files while ``skip_missing`` is false, or
            has the files of no task.
    """
    if task_data is None:
        return list(selection.tasks), ()
    if not task_data.is_dir():
        raise EvaluationError(
            f"`{task_data}` is not a folder of questions; `megapoly export-benchmarks --output "
            f"{task_data}` writes one"
        )
    missing = {task: tuple(missing_files(task, task_data)) for task in selection.tasks}
    skipped = tuple(Skipped(task, files) for task, files in missing.items() if files)
    tasks = [task for task, files in missing.items() if not files]
    if skipped and not (skip_missing and tasks):
        lines = "\n".join(f"  {each.task.name}: {_shortened(each.missing)}" for each in skipped)
        raise EvaluationError(
            f"`{task_data}` lacks the data of {len(skipped)} of {len(missing)} tasks:\n{lines}\n"
            "`megapoly export-benchmarks` writes most files; `--skip-missing` skips these tasks"
        )
    return tasks, skipped


def _shortened(files: tuple[str, ...]) -> str:
    """Join names of files, only the first three if there are more."""
    more = f" and {len(files) - 3} more" if len(files) > 3 else ""
    return ", ".join(files[:3]) + more


def check_task_names(selection: Selection) -> None:
    """Check, before a model is loaded, that all tasks exist.

    Raises:
        EvaluationError: a task is unknown.
    """
    others = [task for task in selection.tasks if task.name not in TASKS]
    if not others:
        return
    from lm_eval.tasks import TaskManager

    known = TaskManager().all_tasks
    for task in others:
        if task.harness_task not in known:
            raise unknown_task(task.harness_task, known)


def _task_manager(tasks: list[EvalTask], folder: Path) -> TaskManager:
    from lm_eval.tasks import TaskManager

    # Reading the harness's 14,000 task files takes 6 s; ours name the files that they include.
    only_ours = all(task.name in TASKS for task in tasks)
    return TaskManager(include_path=str(folder), include_defaults=not only_ours)


def _load(manager: TaskManager, name: str, task: EvalTask, is_local: bool) -> Mapping[str, Any]:
    """Return a task's members as the harness groups them: tasks, groups."""
    if name not in manager.all_tasks:
        raise unknown_task(name, manager.all_tasks)
    try:
        return manager.load([name])
    except Exception as error:  # from a task's own code, datasets or the hub's client
        remedy = (
            "the files must have one JSON object per line, with the fields that "
            "docs/how-to/evaluate.md lists"
            if is_local
            else "without a connection, give a folder of questions with `--task-data`"
        )
        raise EvaluationError(
            f"the data of `{task.name}` cannot be loaded: {type(error).__name__}: {error}; {remedy}"
        ) from error


def _set_fewshot(members: Mapping[str, Any], num_fewshot: int | None) -> None:
    for leaf in members["tasks"].values():
        if num_fewshot is not None:
            leaf.set_config("num_fewshot", num_fewshot)


def _check_duplicates(leaves: list[Any]) -> None:
    seen: set[str] = set()
    for name in (leaf.task_name for leaf in leaves):
        if name in seen:
            raise EvaluationError(f"`{name}` is in two of the requested tasks; leave one out")
        seen.add(name)


def _check_generation(lm: LM, loaded: Mapping[EvalTask, Mapping[str, Any]]) -> None:
    """Refuse generation before anything runs: it comes last, so hours of scoring would be lost."""
    reason = getattr(lm, "refuses_generation", None)
    names = [
        task.name
        for task, members in loaded.items()
        if any(leaf.OUTPUT_TYPE == "generate_until" for leaf in members["tasks"].values())
    ]
    if reason is not None and names:
        raise UnavailableError(
            f"tasks that generate text cannot run ({', '.join(names)}): {reason}"
        )


def _check_programs(leaves: list[Any]) -> None:
    """Refuse tasks that the harness marks as running the model's answers."""
    names = [leaf.task_name for leaf in leaves if getattr(leaf, "UNSAFE_CODE", False)]
    if names:
        raise EvaluationError(
            f"tasks that run the model's answers as programs are refused ({', '.join(names)}); "
            "leave them out, or run them with the harness itself on a machine that may be lost"
        )


def _top_level(members: Mapping[str, Any]) -> list[Any]:
    """Return the requested group, or the tasks of a requested tag."""
    groups = members["groups"]
    inner = {name for children in members["group_map"].values() for name in children}
    top = [group for name, group in groups.items() if name not in inner]
    return top or list(members["tasks"].values())
