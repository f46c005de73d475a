"""The training loop."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence

from megapoly.config.step_ranges import text_of_steps
from megapoly.errors import DivergenceError
from megapoly.training.hooks import Hook, StepRecord
from megapoly.training.reporter import Reporter
from megapoly.training.rewind import way_back
from megapoly.training.state import TrainState
from megapoly.training.step import train_step
from megapoly.training.stop import StopRequest
from megapoly.training.watchdog import heartbeat


def train(state: TrainState, reporter: Reporter, hooks: Sequence[Hook], stop: StopRequest) -> None:
    """Train from the state's position to ``train_iters``, or until requested to stop.

    Args:
        state: the run, restored; changed in place.
        reporter: writes ``metrics.jsonl`` and shows progress.
        hooks: what is done around the steps, in this order; see :class:`Hook`.
        stop: whether to end before; entered by the caller.
    """
    batches = state.training_batches()
    with contextlib.ExitStack() as closing:
        for hook in hooks:
            closing.callback(hook.close)
        while state.iteration < state.train_iters:
            if (passed := state.pass_over()) is not None:
                reporter.message(f"passed over the batches of step {text_of_steps([passed])}")
                batches = state.training_batches()
                continue
            for hook in hooks:
                hook.before_step()
            heartbeat.begin_step(state.iteration + 1)
            start = time.perf_counter()
            try:
                result = train_step(state, batches, stop_requested=stop.requested)
            except DivergenceError as error:
                for hook in hooks:
                    hook.at_divergence()
                raise DivergenceError(f"{error} {way_back(state)}") from None
            state.platform.synchronize()
            step = StepRecord(result, time.perf_counter() - start, stop=result.stop_requested)
            heartbeat.end_step(step.step_time_s)
            for hook in hooks:
                hook.after_step(step)
            reporter.record(step)
            for hook in hooks:
                hook.after_record(step)
            if step.stop:
                reporter.message(f"stop requested: ending after step {state.iteration}")
                break
        heartbeat.begin("end of the training")
        for hook in hooks:
            hook.at_end()
        reporter.end()
