"""A trace of selected steps on selected ranks, by torch's profiler."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.profiler import ProfilerAction, ProfilerActivity, profile, record_function

from megapoly.config import Config
from megapoly.platform.files import free_space
from megapoly.training.hooks import Hook, StepRecord
from megapoly.training.state import TrainState

logger = logging.getLogger(__name__)

# Rows of the table of operators next to the trace.
_TABLE_ROWS = 25


def disturbed_steps(config: Config) -> range:
    """Return the steps that do not count for the speed: the traced ones and the one before.

    The profiler starts in the step before the trace, which takes seconds on a GPU.
    """
    logging = config.logging
    if not logging.profile:
        return range(0)
    return range(logging.profile_step_start - 1, logging.profile_step_end + 1)


class ProfileHook(Hook):
    """Writes ``RUN_DIR/profile/rank_R.steps_A-B.json.gz`` and a table of operators, ``.txt``.

    The trace opens in Perfetto, ``chrome://tracing`` and TensorBoard. It has the steps as
    ``ProfilerStep#N``, N as in the log, and in each the ranges ``gradients`` and ``update``. Inside
    these are the engine's timers: ``forward-compute`` and ``backward-compute`` of each micro-batch,
    ``all-grads-sync``, sends and receives, the parts of the optimizer.

    An evaluation or checkpoint between the steps is in the step that follows it.

    A run that starts after the first of the steps traces the rest of them. One that ends before the
    last of them writes what it has.

    Args:
        state: the run, restored.
        show: shows a line to the user: what is going to be traced.
    """

    def __init__(self, state: TrainState, show: Callable[[str], None]) -> None:
        logging = state.config.logging
        self._state = state
        self._first = max(logging.profile_step_start, state.iteration + 1)
        self._last = logging.profile_step_end
        self._is_due = self._first <= self._last
        self._is_mine = self._is_due and dist.get_rank() in logging.profile_ranks
        # The step before is a warm-up, if it is a step of this process.
        self._begin = max(self._first - 1, state.iteration + 1)
        self._profile: profile | None = None
        show(self._describe())

    def _describe(self) -> str:
        logging = self._state.config.logging
        steps = f"steps {self._first} to {self._last}"
        if not self._is_due:
            done = f"steps {logging.profile_step_start} to {self._last} are done"
            return f"no trace: {done}, the run is at step {self._state.iteration}"
        ranks = ", ".join(map(str, logging.profile_ranks))
        return f"tracing {steps} of ranks {ranks} into {self._folder}"

    @property
    def _folder(self) -> Path:
        return Path(self._state.config.run_dir) / "profile"

    def before_step(self) -> None:
        """Start the profiler before the first of the steps."""
        if not self._is_mine or self._profile is not None:
            return
        step = self._state.iteration + 1
        if step != self._begin:
            return
        activities = [ProfilerActivity.CPU]
        if self._state.platform.is_cuda:
            activities.append(ProfilerActivity.CUDA)
        self._profile = profile(
            activities=activities,
            schedule=self._action,
            on_trace_ready=self._write,
            record_shapes=True,
        )
        self._profile.step_num = step
        self._profile.start()
        _set_timers(self._state, _EngineRanges())

    def after_step(self, step: StepRecord) -> None:
        """Count the step; collective after the last one of a trace."""
        if self._profile is not None:
            self._profile.step()
        if self._is_due and self._state.iteration == self._last:
            self.close()
            # Writing takes seconds, which would otherwise be in the next step of other ranks.
            dist.barrier()

    def _action(self, step: int) -> ProfilerAction:
        step = max(step, self._begin)  # torch starts with step 0, before its number can be set
        if step < self._first:
            return ProfilerAction.WARMUP
        if step < self._last:
            return ProfilerAction.RECORD
        return ProfilerAction.RECORD_AND_SAVE if step == self._last else ProfilerAction.NONE

    def _write(self, trace: profile) -> None:
        """Write the files, if the disk takes them; torch calls it when the trace stops."""
        try:
            self._write_files(trace)
        except OSError as error:
            logger.warning(
                "the trace of rank %d cannot be written: %s; %s",
                dist.get_rank(),
                error.strerror,
                free_space(self._folder),
            )

    def _write_files(self, trace: profile) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        last = min(self._last, self._state.iteration)
        stem = self._folder / f"rank_{dist.get_rank()}.steps_{self._first}-{last}"
        partial = stem.with_name(f"{stem.name}.partial.json.gz")
        try:
            trace.export_chrome_trace(str(partial))
            partial.replace(stem.with_name(f"{stem.name}.json.gz"))
        finally:
            partial.unlink(missing_ok=True)
        device = "cuda" if self._state.platform.is_cuda else "cpu"
        table = trace.key_averages().table(
            sort_by=f"self_{device}_time_total", row_limit=_TABLE_ROWS, max_name_column_width=60
        )
        stem.with_name(f"{stem.name}.txt").write_text(table)

    def close(self) -> None:
        """Stop the profiler, which writes the trace."""
        if self._profile is not None:
            self._profile.stop()
            self._profile, self._is_mine = None, False
            _set_timers(self._state, None)


class _EngineRanges:
    """Replaces the engine's timers (core/timers.py): what they would time becomes a range."""

    def __init__(self) -> None:
        self._ranges: dict[str, _EngineRange] = {}

    def __call__(self, name: str, log_level: int | None = None) -> _EngineRange:
        return self._ranges.setdefault(name, _EngineRange(name))


class _EngineRange:
    def __init__(self, name: str) -> None:
        self._name = name
        self._range: record_function | None = None

    def start(self, barrier: bool = False) -> None:
        self._range = record_function(self._name)
        self._range.__enter__()

    def stop(self, barrier: bool = False) -> None:
        if self._range is not None:
            self._range.__exit__(None, None, None)
            self._range = None


def _set_timers(state: TrainState, timers: _EngineRanges | None) -> None:
    optimizers: list[Any] = getattr(state.optimizer, "chained_optimizers", [state.optimizer])
    for owner in (*state.chunks, *optimizers):
        owner.config.timers = timers
