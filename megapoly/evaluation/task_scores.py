"""Benchmark tasks on a run in training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from megapoly.evaluation.library_logging import quieten_libraries
from megapoly.training.distributed import sum_over_all
from megapoly.training.random_state import preserved_random_state
from megapoly.training.state import TrainState


class TasksStopped(Exception):
    """Some process was asked to stop while tasks were evaluated."""


def check_tasks(state: TrainState) -> None:
    """Ask one question of each of ``training.eval_tasks``, if there are any; collective.

    What is wrong with a task or its questions is known at the start of the run, not hours later.

    Raises:
        MegapolyError: as :func:`task_scores`.
    """
    if state.config.training.eval_tasks is not None:
        task_scores(state, limit=1)


def task_scores(
    state: TrainState, *, limit: int | None, stop_requested: Callable[[], bool] = lambda: False
) -> dict[str, float]:
    """Evaluate ``training.eval_tasks`` on the model as it is; collective.

    The run goes on as if nothing had been evaluated: the harness seeds the generators that dropout
    draws from, and their states are put back.

    Args:
        state: the run.
        limit: questions of each task; null: all.
        stop_requested: whether this process was asked to stop; looked at after every batch.

    Returns:
        Percent by task, on rank 0; on others it may be empty.

    Raises:
        TasksStopped: some process was, on all of them.
        MegapolyError: a task is unknown, generates text, or its questions are missing.
    """
    quieten_libraries()
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
            EngineLM(state, state.corpus.tokenizer, on_progress=stop_together),
            select(training.eval_tasks),
            limit=limit,
            task_data=None if folder is None else Path(folder),
        )
    # The harness gives results to one process of each host.
    return {} if results is None else {each.task.name: each.score for each in results.tasks}
