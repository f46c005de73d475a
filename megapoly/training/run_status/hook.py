"""Fills the status of a run after each step."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from megapoly.platform.json_lines import last_record
from megapoly.training.hooks import CheckpointHook, Hook, StepRecord
from megapoly.training.reporter import Reporter
from megapoly.training.run_status.folders import (
    METRICS,
    newest_checkpoint,
    saved_checkpoint,
    values_of,
)
from megapoly.training.run_status.recorder import StatusRecorder
from megapoly.training.state import TrainState


class StatusHook(Hook):
    """Tells the recorder of each step; the first hook, for evaluations may take minutes.

    Args:
        state: the run, restored.
        reporter: counts spikes, estimates the rest of the run and shows warnings.
        checkpoints: knows the newest checkpoint.
        recorder: of this job.
    """

    def __init__(
        self,
        state: TrainState,
        reporter: Reporter,
        checkpoints: CheckpointHook,
        recorder: StatusRecorder,
    ) -> None:
        self._state, self._reporter = state, reporter
        self._checkpoints, self._recorder = checkpoints, recorder
        run_dir = Path(state.config.run_dir)
        self._newest = newest_checkpoint(run_dir)
        recorder.show = reporter.message
        recorder.change(
            train_iters=state.train_iters,
            **values_of(last_record(run_dir / METRICS)),
            **self._position(),
        )
        recorder.follow(self._checkpoint)

    def after_step(self, step: StepRecord) -> None:
        """Note that a step was made."""
        self._recorder.change(
            loss=step.result.lm_loss,
            step_time_s=step.step_time_s,
            last_step=time.time(),
            **self._position(),
        )

    def after_record(self, step: StepRecord) -> None:
        """Note what was measured of the step."""
        values = values_of(step.metrics)
        if (ratio := step.details.get("ranks/slowest_over_median")) is not None:
            values["slowest_rank_ratio"] = ratio
        spikes, eta_s = self._reporter.num_spikes, self._reporter.eta_s
        self._recorder.change(**values, spikes=spikes, eta_s=eta_s)

    def _position(self) -> dict[str, Any]:
        state = self._state
        return {
            "step": state.iteration,
            "consumed_tokens": state.consumed_tokens,
            "skipped_steps": state.recent_steps.num_skipped,
            "spikes": self._reporter.num_spikes,
        }

    def _checkpoint(self) -> dict[str, Any]:
        """Return the newest checkpoint; its file is looked at once."""
        saved = self._checkpoints.saved
        if saved is not None and (self._newest is None or self._newest.path != str(saved)):
            self._newest = saved_checkpoint(saved)
        return {"checkpoint": self._newest}
