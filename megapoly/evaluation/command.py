"""What ``megapoly evaluate`` does: benchmarks, perplexity or both, by one process or several."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from megapoly.errors import EvaluationError
from megapoly.evaluation.harness import check_names, evaluate_tasks, with_data
from megapoly.evaluation.lm_loader import checkpoint_of, load_lm
from megapoly.evaluation.loaded_checkpoint import LoadedCheckpoint, loaded_checkpoint
from megapoly.evaluation.perplexity import report_perplexity
from megapoly.evaluation.request import EvaluationRequest, find_problems
from megapoly.evaluation.results import TaskResults, as_json, write_json
from megapoly.evaluation.results_table import show_results
from megapoly.evaluation.tasks import select
from megapoly.platform import launcher
from megapoly.platform.progress import OnProgress, counting_bar

if TYPE_CHECKING:
    from lm_eval.api.model import LM

DEFAULT_BATCH_SIZE = 8


@dataclass
class _Found:
    """What there is to write: how it was computed, and the figures."""

    model: Mapping[str, Any]
    tasks: TaskResults | None = None
    perplexity: Mapping[str, Any] | None = None


def evaluate(asked: EvaluationRequest) -> None:
    """Evaluate, print tables and write the JSON; collective in a job of several processes.

    The process that is the job's first, by torchrun's environment, prints and writes; the others
    are silent.

    Raises:
        MegapolyError: what cannot be evaluated, and why. In a job of several processes all raise,
            or were stopped by their launcher.
    """
    checkpoint = checkpoint_of(asked.model)
    num_processes = launcher.world_size()
    problems = list(find_problems(asked, checkpoint, num_processes))
    if problems:
        raise EvaluationError("\n".join(problems))
    if asked.tasks:
        select(asked.tasks)
    if num_processes > 1:
        assert checkpoint is not None, "a problem otherwise"
        found = _by_the_engine(asked, checkpoint)
    else:
        found = _by_one_process(asked, checkpoint)
    if asked.json is not None and _is_first():
        write_json(asked.json, as_json(found.model, tasks=found.tasks, perplexity=found.perplexity))


def _by_one_process(asked: EvaluationRequest, checkpoint: Path | None) -> _Found:
    """Perplexity comes first: the engine's import must find the process as it is at its start."""
    _check_inputs(asked)
    perplexity, model = None, {}
    if asked.perplexity:
        assert checkpoint is not None, "a problem otherwise"
        with loaded_checkpoint(checkpoint, _words(asked), with_validation=True) as opened:
            perplexity, model = report_perplexity(opened), _engine_entry(asked, opened)
    if not asked.tasks:
        return _Found(model, perplexity=perplexity)
    from megapoly.platform.device import default_device

    device = asked.device or default_device()
    _message(f"{checkpoint or asked.model} on {device}")
    lm = load_lm(
        checkpoint or asked.model,
        dtype=asked.dtype,
        device=device,
        batch_size=asked.batch_size or DEFAULT_BATCH_SIZE,
        add_bos=asked.add_bos,
    )
    model = _entry(asked, dtype=str(lm.model.dtype).removeprefix("torch."), device=device)
    with _answers_bar() as on_progress:
        tasks = _run_tasks(asked, lm, on_progress)
    _show(asked, tasks)
    return _Found(model, tasks, perplexity)


def _by_the_engine(asked: EvaluationRequest, checkpoint: Path) -> _Found:
    with loaded_checkpoint(
        checkpoint,
        _words(asked),
        with_validation=asked.perplexity,
        check=lambda: _check_inputs(asked),
    ) as opened:
        found = _Found(_engine_entry(asked, opened))
        if asked.perplexity:
            found.perplexity = report_perplexity(opened)
        if asked.tasks:
            from megapoly.evaluation.engine_lm import EngineLM

            _message(f"{checkpoint} on {found.model['num_processes']} x {found.model['device']}")
            with _answers_bar() as on_progress:
                lm = EngineLM(
                    opened.model,
                    opened.tokenizer,
                    batch_size=asked.batch_size or DEFAULT_BATCH_SIZE,
                    add_bos=asked.add_bos,
                    on_progress=on_progress,
                )
                found.tasks = _run_tasks(asked, lm, None)
            _show(asked, found.tasks)
    return found


def _run_tasks(
    asked: EvaluationRequest, lm: LM, on_progress: OnProgress | None
) -> TaskResults | None:
    return evaluate_tasks(
        lm,
        select(asked.tasks),
        limit=asked.limit,
        task_data=asked.task_data,
        num_fewshot=asked.num_fewshot,
        skip_missing=asked.skip_missing,
        on_progress=on_progress,
    )


def _show(asked: EvaluationRequest, tasks: TaskResults | None) -> None:
    if tasks is not None and _is_first():
        show_results(tasks, asked.model.resolve().name, Console())


def _check_inputs(asked: EvaluationRequest) -> None:
    """What would otherwise be found when the model is loaded, or after hours, figures lost."""
    if asked.json is not None and _is_first():
        is_there = asked.json.exists()
        try:
            asked.json.parent.mkdir(parents=True, exist_ok=True)
            asked.json.open("a").close()
            if not is_there:
                asked.json.unlink()
        except OSError as error:
            raise EvaluationError(
                f"`--json` ({asked.json}) cannot be written: {error.strerror}"
            ) from error
    if asked.tasks:
        selection = select(asked.tasks)
        with_data(selection, asked.task_data, asked.skip_missing)
        check_names(selection)


def _words(asked: EvaluationRequest) -> list[str]:
    """Overrides of the checkpoint's configuration; --device and --dtype are such, too."""
    words = list(asked.words)
    if asked.device is not None:
        words.append(f"--training.device={asked.device}")
    if asked.dtype != "auto":
        words.append(f"--training.bf16={str(asked.dtype == 'bfloat16').lower()}")
    return words


def _engine_entry(asked: EvaluationRequest, opened: LoadedCheckpoint) -> dict[str, Any]:
    config = opened.model.config
    return _entry(
        asked,
        dtype="bfloat16" if config.training.bf16 else "float32",
        device=opened.model.platform.device.type,
    )


def _entry(asked: EvaluationRequest, *, dtype: str, device: str) -> dict[str, Any]:
    """How it was computed, as the JSON has it."""
    entry = {
        "path": str((checkpoint_of(asked.model) or asked.model).resolve()),
        "dtype": dtype,
        "device": device,
        "num_processes": launcher.world_size(),
        "options": list(asked.words),
    }
    if asked.tasks:
        entry["batch_size"] = asked.batch_size or DEFAULT_BATCH_SIZE
        entry["add_bos"] = asked.add_bos
    return entry


def _is_first() -> bool:
    return launcher.rank() == 0


def _messages() -> Console:
    return Console(stderr=True, quiet=not _is_first())


def _message(text: str) -> None:
    _messages().print(text, highlight=False, markup=False, soft_wrap=True)


def _answers_bar() -> AbstractContextManager[OnProgress]:
    return counting_bar("answers scored", _messages(), until_first="reading the tasks")
