"""The training loop."""

from __future__ import annotations

import time

from megapoly.evaluation.task_scores import TasksStopped, check_tasks, task_scores
from megapoly.training.checkpoint import save_checkpoint
from megapoly.training.evaluation import evaluate_validation_sets
from megapoly.training.profiling import StepProfiler
from megapoly.training.reporter import Reporter
from megapoly.training.state import TrainState
from megapoly.training.step import train_step
from megapoly.training.stop import StopRequest
from megapoly.training.telemetry import ExpertLoad, activation_coefficients


def train(state: TrainState, reporter: Reporter) -> None:
    """Train from the state's position to ``train_iters``, or until asked to stop."""
    config = state.config
    last = config.training.train_iters
    assert last is not None
    batches = state.training_batches()
    expert_load = ExpertLoad(state)
    check_tasks(state)
    saved_at = None

    def save() -> None:
        nonlocal saved_at
        if saved_at != state.iteration:
            saved_at = state.iteration
            reporter.message(f"saved {save_checkpoint(state)}")

    profiler = StepProfiler(state)
    if (description := profiler.describe()) is not None:
        reporter.message(description)
    with StopRequest() as stop, profiler:
        while state.iteration < last:
            profiler.begin_step()
            start = time.perf_counter()
            result = train_step(state, batches, stop_requested=stop.requested)
            state.platform.synchronize()
            step_time_s = time.perf_counter() - start
            profiler.end_step()

            evaluations, tasks, details = {}, {}, {}
            stopping = result.stop_requested
            save_due = config.checkpoint.save and _due(state, config.checkpoint.save_interval)
            if _due(state, config.training.eval_interval):
                evaluations = evaluate_validation_sets(state, state.corpus.validation)
            if _due(state, config.training.eval_tasks_interval) and not stopping:
                if save_due:  # tasks take long
                    save()
                try:
                    tasks = task_scores(
                        state,
                        limit=config.training.eval_tasks_limit,
                        stop_requested=lambda: stop.requested,
                    )
                except TasksStopped:
                    stopping = True
            if _due(state, config.logging.detail_interval):
                details = expert_load.collect() | activation_coefficients(state)
            reporter.step(result, step_time_s, evaluations, details, tasks)

            if save_due:
                save()
            if stopping:
                reporter.message(f"asked to stop after step {state.iteration}")
                break
        if config.checkpoint.save:
            save()
        reporter.end()


def _due(state: TrainState, interval: int) -> bool:
    """Whether something that happens every ``interval`` steps (0: never) and at the end is due."""
    at_end = state.iteration == state.config.training.train_iters
    return interval > 0 and (at_end or state.iteration % interval == 0)
