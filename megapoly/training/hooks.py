"""Hooks: what a run does around its steps. The protocol, and the small built-in hooks.

``build_hooks`` in ``megapoly/pretrain.py`` lists the hooks of a run. Larger ones are in
:mod:`megapoly.training.profiling`, :mod:`megapoly.training.tensorboard` and
:mod:`megapoly.evaluation.task_scores`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from megapoly.training.evaluation import evaluate_validation_sets
from megapoly.training.save_checkpoint import save_checkpoint
from megapoly.training.state import TrainState
from megapoly.training.step import StepResult
from megapoly.training.telemetry import ExpertLoad, activation_coefficients
from megapoly.training.watchdog import heartbeat


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
        with heartbeat.during("evaluation", uses_files=False):
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

    Args:
        state: the run.
        show: shows a line to the user.
    """

    def __init__(self, state: TrainState, show: Callable[[str], None]) -> None:
        self._state, self._show = state, show
        self._saved_at: int | None = None

    def after_record(self, step: StepRecord) -> None:
        """Save, if due."""
        self.save_if_due()

    def at_end(self) -> None:
        """Save what was trained since the last checkpoint."""
        self._save()

    def save_if_due(self) -> None:
        """Save, if due; for a hook that takes long, before it begins."""
        if is_due(self._state, self._state.config.checkpoint.save_interval):
            self._save()

    def _save(self) -> None:
        if self._state.config.checkpoint.save and self._saved_at != self._state.iteration:
            self._saved_at = self._state.iteration
            with heartbeat.during("saving"):
                self._show(f"saved {save_checkpoint(self._state)}")
