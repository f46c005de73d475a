"""Benchmark tasks on a run in training."""

from __future__ import annotations

from megapoly.training.distributed import is_rank_zero
from megapoly.training.random_state import preserved_random_state
from megapoly.training.state import TrainState


def task_scores(state: TrainState) -> dict[str, float]:
    """Evaluate ``training.eval_tasks`` on the model as it is; collective.

    The run goes on as if nothing had been evaluated: the harness seeds the generators that dropout
    draws from, and their states are put back.

    Returns:
        Percent by task or group, on rank 0; elsewhere nothing.

    Raises:
        MegapolyError: a task is unknown, generates text, or its questions are missing.
    """
    # Here and not above: the harness takes seconds to import, and most runs go without it.
    from megapoly.evaluation.engine_lm import EngineLM
    from megapoly.evaluation.harness import evaluate_tasks

    training = state.config.training
    assert training.eval_tasks is not None, "the rules refuse an interval without tasks"
    with preserved_random_state(state.platform):
        results = evaluate_tasks(
            EngineLM(state, state.corpus.tokenizer),
            training.eval_tasks,
            limit=training.eval_tasks_limit,
            task_data=training.eval_tasks_data,
        )
    if not is_rank_zero():
        return {}
    return {name: entry.score for name, entry in results.scores.items()}
