"""Benchmark tasks on a run in training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from megapoly.platform.logs import silence_evaluation_libraries
from megapoly.training.distributed import sum_over_all
from megapoly.training.hooks import CheckpointHook, Hook, StepRecord, is_due
from megapoly.training.random_state import preserved_random_state
from megapoly.training.state import TrainState
from megapoly.training.stop import StopRequest


class TasksStopped(Exception):
    """Some process was requested to stop while tasks were evaluated."""


class TaskHook(Hook):
    """Evaluates ``training.eval_tasks`` every ``training.eval_tasks_interval`` steps.

    Adds ``task/NAME`` and its standard error ``task_stderr/NAME`` to the metrics. Tasks take long:
    a checkpoint that is due at the same step is saved first, and a request to stop ends them.
    Building the hook evaluates one question of each task, so that an error in a task or its
    questions is reported at the start of the run.

    Args:
        state: the run.
        checkpoints: saves it.
        stop: whether this process was requested to stop.

    Raises:
        MegapolyError: as :func:`task_scores`.
    """

    def __init__(self, state: TrainState, checkpoints: CheckpointHook, stop: StopRequest) -> None:
        self._state, self._checkpoints, self._stop = state, checkpoints, stop
        task_scores(state, limit=1)

    def after_step(self, step: StepRecord) -> None:
        """Evaluate, if due and the run is to continue."""
        training = self._state.config.training
        if step.stop or not is_due(self._state, training.eval_tasks_interval):
            return
        self._checkpoints.save_if_due(wait=True)
        try:
            scores = task_scores(
                self._state,
                limit=training.eval_tasks_limit,
                stop_requested=lambda: self._stop.requested,
            )
        except TasksStopped:
            step.stop = True
        else:
            step.metrics |= scores


def task_scores(
    state: TrainState, *, limit: int | None, stop_requested: Callable[[], bool] = lambda: False
) -> dict[str, float]:
    """Evaluate ``training.eval_tasks`` on the current weights; collective.

    The run continues as if nothing had been evaluated: the harness seeds the generators that
    dropout draws from, and their states are restored.

    Args:
        state: the run.
        limit: questions of each task; None: all.
        stop_requested: whether this process was requested to stop; checked after every batch.

    Returns:
        Metrics, in percent, on rank 0; on others it may be empty. A single question has no error.

    Raises:
        TasksStopped: on all processes, when one of them was requested to stop.
        MegapolyError: a task is unknown, generates text, or its questions are missing.
    """
    silence_evaluation_libraries()
    # Here and not above: the harness takes seconds to import, and most runs go without it.
    from megapoly.evaluation.engine_lm import EngineLM
    from megapoly.evaluation.harness import evaluate_tasks
    from megapoly.evaluation.tasks import select

    training = state.config.training
    assert training.eval_tasks is not None, "the rules refuse an interval without tasks"
    folder = training.eval_tasks_data

    def stop_together(done: int, total: int) -> None:
        (requests,) = sum_over_all([float(stop_requested())], state.platform)
        if requests:
            raise TasksStopped

    with preserved_random_state(state.platform):
        results = evaluate_tasks(
            EngineLM(
                state,
                state.corpus.tokenizer,
                add_bos=state.add_bos,
                on_progress=stop_together,
            ),
            select(training.eval_tasks),
            limit=limit,
            task_data=None if folder is None else Path(folder),
        )
    # The harness gives results to one process of each host.
    metrics = {}
    for each in () if results is None else results.tasks:
        metrics[f"task/{each.task.name}"] = each.score
        if each.stderr is not None:
            metrics[f"task_stderr/{each.task.name}"] = each.stderr
    return metrics
