"""Hooks: what a run does around its steps. The protocol, and the small built-in hooks.

``build_hooks`` in ``megapoly/pretrain.py`` lists the hooks of a run. Larger ones are in
:mod:`megapoly.training.profiling`, :mod:`megapoly.training.tensorboard` and
:mod:`megapoly.evaluation.task_scores`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from megapoly.errors import CheckpointError
from megapoly.training.evaluation import evaluate_validation_sets
from megapoly.training.save_checkpoint import CheckpointSaver
from megapoly.training.state import TrainState
from megapoly.training.step import StepResult
from megapoly.training.telemetry import ExpertLoad, activation_coefficients


@dataclass
class StepRecord:
    """A finished step, as the hooks see and extend it.

    Args:
        result: of the step.
        step_time_s: seconds from its start to its end, without hooks and reports.
        stop: the run ends after this step; the same on every rank.
        metrics: scalars for ``metrics.jsonl`` and TensorBoard, by name. In
            :meth:`Hook.after_record` rank 0 also has the scalars of the step itself.
        details: scalars for TensorBoard only.
    """

    result: StepResult
    step_time_s: float
    stop: bool = False
    metrics: dict[str, float] = field(default_factory=dict)
    details: dict[str, float] = field(default_factory=dict)

    @property
    def is_evaluated(self) -> bool:
        """Whether the metrics have results of validation sets or tasks."""
        return any(name.startswith(("val/", "task/")) for name in self.metrics)


class Hook:
    """Base class of what runs around the steps of a run; a subclass overrides what it needs.

    Every rank builds the hooks after the run is restored and calls them in the same order, so they
    may be collective. The built-in hooks do not change what a step computes.
    """

    def before_step(self) -> None:
        """Act before a step; its time does not include this."""

    def after_step(self, step: StepRecord) -> None:
        """Act after a step and before it is recorded; may add to the record or set ``stop``."""

    def after_record(self, step: StepRecord) -> None:
        """Act when ``metrics.jsonl`` has the step."""

    def at_end(self) -> None:
        """Act when the run is complete or was requested to stop, but not after an error."""

    def at_divergence(self) -> None:
        """Act when a loss or gradient that is not finite ends the run, which every rank finds."""

    def close(self) -> None:
        """Release what the hook holds, also after an error; the last hook is closed first."""


def is_due(state: TrainState, interval: int) -> bool:
    """Check whether something is due that happens every ``interval`` steps and after the last.

    Args:
        state: after a step.
        interval: steps; 0: never.
    """
    at_end = state.iteration == state.train_iters
    return interval > 0 and (at_end or state.iteration % interval == 0)


class ValidationHook(Hook):
    """Evaluates the validation sets every ``training.eval_interval`` steps.

    Adds ``val/NAME/loss`` and ``val/NAME/ppl`` to the metrics.
    """

    def __init__(self, state: TrainState) -> None:
        self._state = state

    def after_step(self, step: StepRecord) -> None:
        """Evaluate, if due."""
        if not is_due(self._state, self._state.config.training.eval_interval):
            return
        evaluations = evaluate_validation_sets(self._state, self._state.corpus.validation)
        for name, evaluation in evaluations.items():
            step.metrics[f"val/{name}/loss"] = evaluation.loss
            step.metrics[f"val/{name}/ppl"] = evaluation.ppl


class TelemetryHook(Hook):
    """Looks inside the model every ``logging.detail_interval`` steps.

    Adds the load of the experts and the coefficients of the activations to the details.
    """

    def __init__(self, state: TrainState) -> None:
        self._state = state
        self._expert_load = ExpertLoad(state)

    def after_step(self, step: StepRecord) -> None:
        """Collect the scalars, if due."""
        if is_due(self._state, self._state.config.logging.detail_interval):
            step.details |= self._expert_load.collect() | activation_coefficients(self._state)


class CheckpointHook(Hook):
    """Saves every ``checkpoint.save_interval`` steps and at the end, if ``checkpoint.save`` is on.

    With ``checkpoint.async_save`` the run trains on while a checkpoint is written. There is one at
    a time: the next waits for it.

    When a checkpoint cannot be saved, as on a full disk, the run trains on and tries the next one;
    the error of the last one ends it.

    Args:
        state: the run.
        show: shows a line to the user.
    """

    def __init__(self, state: TrainState, show: Callable[[str], None]) -> None:
        self._state, self._show = state, show
        self._saver = CheckpointSaver(state)
        self._tried_at: int | None = None
        self._failure: CheckpointError | None = None  # of the last try

    def after_record(self, step: StepRecord) -> None:
        """Complete a checkpoint that has been written, and save, if due."""
        self._finish(wait=False)
        self.save_if_due()

    def at_end(self) -> None:
        """Save what was trained since the last checkpoint.

        Raises:
            CheckpointError: it could not be saved; on every rank.
        """
        self._save(in_background=False)
        if self._failure is not None:  # once more: there may be room by now
            self._show_saved(self._saver.save(in_background=False))

    def at_divergence(self) -> None:
        """Complete the checkpoint of an earlier step."""
        self._finish(wait=True)

    def close(self) -> None:
        """End the processes that still write; only after an error there are any."""
        self._saver.close()

    def save_if_due(self, *, wait: bool = False) -> None:
        """Save, if due.

        Args:
            wait: until the checkpoint is complete; for a hook that takes long, before it begins.
        """
        settings = self._state.config.checkpoint
        if is_due(self._state, settings.save_interval):
            self._save(in_background=settings.async_save and not wait)

    def _save(self, *, in_background: bool) -> None:
        if not self._state.config.checkpoint.save:
            return
        is_new = self._tried_at != self._state.iteration
        if self._saver.path is not None and (is_new or not in_background):
            if is_new and not self._finish(wait=False):
                self._show(f"waiting for {self._saver.path}, which is still being written")
            self._finish(wait=True)
        if is_new:
            self._tried_at, self._failure = self._state.iteration, None
            with self._failure_shown():
                self._show_saved(self._saver.save(in_background=in_background))

    def _finish(self, *, wait: bool) -> bool:
        with self._failure_shown():
            return self._show_saved(self._saver.finish(wait=wait))
        return False

    @contextlib.contextmanager
    def _failure_shown(self) -> Iterator[None]:
        try:
            yield
        except CheckpointError as error:  # on every rank
            self._failure = error
            self._show(f"warning: {error}")

    def _show_saved(self, path: Path | None) -> bool:
        if path is not None:
            self._show(f"saved {path}")
        return path is not None
