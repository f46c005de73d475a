"""Work of ``megapoly evaluate``: benchmarks, perplexity or both, in one process or several."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from megapoly.checkpoints.local_copy import local_model
from megapoly.checkpoints.verify import ALONE, Ranks
from megapoly.config.command_line import check_can_write
from megapoly.conversion.checkpoint_reader import find_checkpoint, names_checkpoint
from megapoly.conversion.folder_code import note_on_code
from megapoly.errors import EvaluationError
from megapoly.evaluation.harness import (
    available_tasks,
    check_task_names,
    evaluate_tasks,
    import_harness,
)
from megapoly.evaluation.lm_loader import load_lm
from megapoly.evaluation.loaded_checkpoint import LoadedCheckpoint, loaded_checkpoint
from megapoly.evaluation.local_tasks import fingerprint_of_questions
from megapoly.evaluation.perplexity import report_perplexity
from megapoly.evaluation.ranks import MeetingRanks
from megapoly.evaluation.request import DEFAULT_BATCH_SIZE, EvaluationRequest, find_problems
from megapoly.evaluation.results import TaskResults, as_json, write_results
from megapoly.evaluation.results_table import show_results
from megapoly.evaluation.tasks import select
from megapoly.platform import launcher
from megapoly.platform.progress import OnProgress, counting_bar
from megapoly.platform.stores import is_url

if TYPE_CHECKING:
    from lm_eval.api.model import LM


@dataclass
class _Outcome:
    """Figures, and how they were computed."""

    model: Mapping[str, Any]
    tasks: TaskResults | None = None
    perplexity: Mapping[str, Any] | None = None


def evaluate(request: EvaluationRequest) -> None:
    """Evaluate, print tables and write the JSON; collective in a job of several processes.

    Only the first process of the job, by torchrun's environment, prints and writes.

    Raises:
        MegapolyError: something cannot be evaluated. In a job of several processes all raise, or
            are stopped by their launcher.
    """
    num_processes, ranks = launcher.world_size(), ALONE
    if is_url(request.model):
        ranks = _meet(num_processes)
        copy = local_model(request.model, ranks, launcher.local_rank())
        request = replace(request, model=copy)
    named = request.folder if names_checkpoint(request.folder) else None
    problems = list(find_problems(request, named, num_processes))
    if problems:
        raise EvaluationError("\n".join(problems))
    if request.tasks:
        select(request.tasks)
    if num_processes > 1:
        assert named is not None, "checked by find_problems"
        ranks = _meet(num_processes) if ranks is ALONE else ranks
        checkpoint = find_checkpoint(named, ranks)
        assert checkpoint is not None, "named"
        outcome = _evaluate_on_ranks(request, checkpoint)
    else:
        outcome = _evaluate_in_one_process(request, named and find_checkpoint(named))
    if request.output is not None and _is_first():
        content = as_json(outcome.model, tasks=outcome.tasks, perplexity=outcome.perplexity)
        write_results(request.output, content)


def _meet(num_processes: int) -> Ranks:
    """Return the processes of the job after they have met."""
    return MeetingRanks().ranks() if num_processes > 1 else ALONE


def _evaluate_in_one_process(request: EvaluationRequest, checkpoint: Path | None) -> _Outcome:
    """Compute perplexity first: the engine must be imported into a fresh process."""
    _check_inputs(request)
    perplexity, model = None, {}
    if request.perplexity:
        assert checkpoint is not None, "checked by find_problems"
        with loaded_checkpoint(checkpoint, _overrides(request), with_validation=True) as loaded:
            perplexity, model = report_perplexity(loaded), _engine_entry(request, loaded)
    if not request.tasks:
        return _Outcome(model, perplexity=perplexity)
    from megapoly.platform.device import default_device

    device = request.device or default_device()
    _message(f"{checkpoint or request.folder} on {device}")
    if (
        checkpoint is None
        and not request.trust_remote_code
        and (note := note_on_code(request.folder))
    ):
        _message(f"note: {note}")
    lm = load_lm(
        checkpoint or request.folder,
        dtype=request.dtype,
        device=device,
        batch_size=request.batch_size or DEFAULT_BATCH_SIZE,
        add_bos=request.add_bos,
        run_code=request.trust_remote_code,
    )
    dtype = str(lm.model.dtype).removeprefix("torch.")
    model = _entry(
        request, checkpoint or request.folder, dtype=dtype, device=device, add_bos=lm.adds_bos
    )
    with _answers_bar() as on_progress:
        tasks = _run_tasks(request, lm, on_progress)
    _show(request, tasks)
    return _Outcome(model, tasks, perplexity)


def _evaluate_on_ranks(request: EvaluationRequest, checkpoint: Path) -> _Outcome:
    with loaded_checkpoint(
        checkpoint,
        _overrides(request),
        with_validation=request.perplexity,
        check=lambda: _check_inputs(request),
    ) as loaded:
        outcome = _Outcome(_engine_entry(request, loaded))
        if request.perplexity:
            outcome.perplexity = report_perplexity(loaded)
        if request.tasks:
            from megapoly.evaluation.engine_lm import EngineLM

            where = f"{outcome.model['num_processes']} x {outcome.model['device']}"
            _message(f"{checkpoint} on {where}")
            with _answers_bar() as on_progress:
                lm = EngineLM(
                    loaded.model,
                    loaded.tokenizer,
                    batch_size=request.batch_size or DEFAULT_BATCH_SIZE,
                    add_bos=_adds_bos(request, loaded),
                    on_progress=on_progress,
                )
                outcome.tasks = _run_tasks(request, lm, None)
            _show(request, outcome.tasks)
    return outcome


def _run_tasks(
    request: EvaluationRequest, lm: LM, on_progress: OnProgress | None
) -> TaskResults | None:
    return evaluate_tasks(
        lm,
        select(request.tasks),
        limit=request.limit,
        task_data=request.task_data,
        num_fewshot=request.num_fewshot,
        skip_missing=request.skip_missing,
        on_progress=on_progress,
    )


def _show(request: EvaluationRequest, tasks: TaskResults | None) -> None:
    if tasks is not None and _is_first():
        show_results(tasks, request.folder.resolve().name, Console())


def _check_inputs(request: EvaluationRequest) -> str:
    """Check now what would otherwise fail after the model is loaded, or after hours of work.

    Returns:
        The fingerprint of the questions in a folder.
    """
    if request.output is not None and _is_first():
        check_can_write("--output", request.output)
    if request.tasks:
        import_harness()
        selection = select(request.tasks)
        available_tasks(selection, request.task_data, request.skip_missing)
        check_task_names(selection)
    return fingerprint_of_questions(request.task_data)


def _overrides(request: EvaluationRequest) -> list[str]:
    """Return the overrides of the checkpoint's configuration, including --device and --dtype."""
    overrides = list(request.overrides)
    if request.device is not None:
        overrides.append(f"--training.device={request.device}")
    if request.dtype != "auto":
        overrides.append(f"--training.bf16={str(request.dtype == 'bfloat16').lower()}")
    return overrides


def _engine_entry(request: EvaluationRequest, loaded: LoadedCheckpoint) -> dict[str, Any]:
    config = loaded.model.config
    return _entry(
        request,
        loaded.path,
        dtype="bfloat16" if config.training.bf16 else "float32",
        device=loaded.model.platform.device.type,
        add_bos=_adds_bos(request, loaded),
    )


def _adds_bos(request: EvaluationRequest, loaded: LoadedCheckpoint) -> bool:
    return loaded.add_bos if request.add_bos is None else request.add_bos


def _entry(
    request: EvaluationRequest, path: Path, *, dtype: str, device: str, add_bos: bool
) -> dict[str, Any]:
    """Return how the figures were computed, for the JSON."""
    entry = {
        "path": str(path.resolve()),
        "dtype": dtype,
        "device": device,
        "num_processes": launcher.world_size(),
        "options": list(request.overrides),
    }
    if request.tasks:
        entry["batch_size"] = request.batch_size or DEFAULT_BATCH_SIZE
        entry["add_bos"] = add_bos
    return entry


def _is_first() -> bool:
    return launcher.rank() == 0


def _messages() -> Console:
    return Console(stderr=True, quiet=not _is_first())


def _message(text: str) -> None:
    _messages().print(text, highlight=False, markup=False, soft_wrap=True)


def _answers_bar() -> AbstractContextManager[OnProgress]:
    return counting_bar("answers scored", _messages(), until_first="reading the tasks")
