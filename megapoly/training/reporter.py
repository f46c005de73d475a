"""Progress lines and ``metrics.jsonl``. Only rank 0 shows and writes them."""

from __future__ import annotations

import contextlib
import datetime
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from megapoly.config.data_sources import MEAN
from megapoly.platform.json_lines import LineWriter, drop_lines_after
from megapoly.training.hooks import StepRecord, is_due
from megapoly.training.profiling import disturbed_steps
from megapoly.training.state import TrainState
from megapoly.training.step import StepResult
from megapoly.training.throughput import Throughput, shown

# Number of validation sets whose losses a step's line shows. With more sets it shows only the mean,
# and after an evaluation a second line shows all. Tasks have no mean: more tasks are only in the
# second line.
_INLINE_SETS = 3
# Number of damaged lines of metrics.jsonl that are named.
_NAMED = 5


class Reporter:
    """Shows and records a run.

    Args:
        state: the run, restored; lines of ``metrics.jsonl`` after its position are deleted.
        num_devices: processes of the job.
        enabled: true on rank 0 only.

    Attributes:
        num_spikes: steps of the run with a spike, those in ``metrics.jsonl``.
    """

    def __init__(self, state: TrainState, *, num_devices: int, enabled: bool) -> None:
        self._state, self._enabled = state, enabled
        self._throughput = Throughput(
            state.config, device_name=state.platform.describe(), num_devices=num_devices
        )
        self._disturbed = disturbed_steps(state.config)
        self.num_spikes = 0
        self._last_loss: dict[str, float] = {}
        self._last_score: dict[str, float] = {}
        self._resources = contextlib.ExitStack()
        self._console = Console(highlight=False)
        self._metrics: LineWriter | None = None
        self._progress: Progress | None = None

    def __enter__(self) -> Reporter:
        if not self._enabled:
            return self
        path = Path(self._state.config.run_dir) / "metrics.jsonl"
        self._drop_after(path, self._state.iteration)
        self._metrics = LineWriter(path, self.message)
        self._resources.callback(self._metrics.close)
        if self._console.is_terminal:
            self._progress = self._resources.enter_context(self._live_progress())
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self._resources.close()

    def _live_progress(self) -> Progress:
        progress = Progress(
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            console=self._console,
        )
        state = self._state
        progress.add_task("train", total=state.train_iters, completed=state.iteration, status="")
        return progress

    def _drop_after(self, path: Path, iteration: int) -> None:
        """Delete the lines of steps after one; name the lines that are damaged."""
        try:
            damaged = drop_lines_after(path, lambda line: self._is_after(line, iteration))
        except FileNotFoundError:
            return
        except OSError as error:
            self.message(f"warning: {path} cannot be read or changed: {error.strerror}")
            return
        if damaged:
            numbers = ", ".join(map(str, damaged[:_NAMED])) + (", ..." if damaged[_NAMED:] else "")
            self.message(f"warning: {path} has damaged lines, which are left out: {numbers}")

    def _is_after(self, line: Mapping[str, Any], iteration: int) -> bool:
        """Return whether a line is of a step after one; count the spikes of the others."""
        is_after = _step(line) > iteration
        self.num_spikes += bool(line.get("spike")) and not is_after
        return is_after

    def message(self, text: str) -> None:
        """Show a line."""
        if self._enabled:
            self._console.print(text, markup=False, soft_wrap=True)

    def begin(self) -> None:
        """Show how TFLOP/s and MFU are computed."""
        self.message(self._throughput.describe())

    def end(self) -> None:
        """Show how fast the steps were."""
        if (mean := self._throughput.mean()) is not None:
            self.message(mean)

    def record(self, step: StepRecord) -> None:
        """Write a line of ``metrics.jsonl``, and show one when it is time.

        Args:
            step: what the hooks added to its metrics comes after the metrics of the step itself.
        """
        if not self._enabled:
            return
        step.metrics = self._metrics_of(step) | step.metrics
        assert self._metrics is not None
        self.num_spikes += bool(step.result.unusual)
        self._metrics.write(_without_nan(step.metrics) | {"time": round(time.time(), 3)})
        if step.stop or is_due(self._state, self._state.config.checkpoint.save_interval):
            self._metrics.flush_to_disk()  # a checkpoint's steps are there when it is
        for name, value in step.metrics.items():
            if name.startswith("val/") and name.endswith("/loss"):
                self._last_loss[name.removesuffix("/loss")] = value
            elif name.startswith("task/"):
                self._last_score[name] = value
        self._show(step)

    def _metrics_of(self, step: StepRecord) -> dict[str, float]:
        state, result = self._state, step.result
        metrics = {
            "iteration": state.iteration,
            "consumed_samples": state.consumed_samples,
            "consumed_tokens": state.consumed_tokens,
            "lm_loss": result.lm_loss,
            "grad_norm": result.grad_norm,
            "learning_rate": result.learning_rate,
            "step_time_s": step.step_time_s,
        }
        # The forward pass of an unusual step is run twice.
        is_disturbed = state.iteration in self._disturbed or bool(result.unusual)
        metrics |= self._throughput.add_step(step.step_time_s, is_disturbed=is_disturbed)
        metrics |= result.aux_losses
        if result.unusual:
            metrics["spike"] = True
        if result.num_skipped:
            metrics["skipped_steps"] = result.num_skipped
        if state.platform.is_cuda:
            metrics["max_memory_allocated_bytes"] = torch.cuda.max_memory_allocated()
        return metrics

    def _show(self, step: StepRecord) -> None:
        state, total = self._state, self._state.train_iters
        if step.result.unusual:
            self.message(_unusual_line(step.result))
        status = self._status(step.metrics)
        if self._progress is not None:
            task = self._progress.task_ids[0]
            self._progress.update(task, completed=state.iteration, status=status)
        due = state.iteration % state.config.logging.log_interval == 0
        last = state.iteration == total
        evaluated = step.is_evaluated
        if evaluated or (self._progress is None and (due or last or state.iteration == 1)):
            line = f"step {state.iteration:>{len(str(total))}}/{total}"
            self.message(f"{line} | {status}")
            more = _losses(self._last_loss) if self._has_many_sets() else []
            more += _scores(self._last_score) if self._has_many_tasks() else []
            if evaluated and more:
                self.message(f"{line} | {' | '.join(more)}")

    def _has_many_sets(self) -> bool:
        return len(self._last_loss) > _INLINE_SETS + 1  # and their mean

    def _has_many_tasks(self) -> bool:
        return len(self._last_score) > _INLINE_SETS

    def _status(self, metrics: Mapping[str, float]) -> str:
        parts = [f"loss {metrics['lm_loss']:.4f}"]
        mean = f"val/{MEAN}"
        only = {mean: self._last_loss[mean]} if self._has_many_sets() else self._last_loss
        parts += _losses(only)
        parts += [] if self._has_many_tasks() else _scores(self._last_score)
        parts += [
            f"lr {metrics['learning_rate']:.2e}",
            f"grad norm {metrics['grad_norm']:.3f}",
            *shown(metrics),
        ]
        parts.append(f"ETA {datetime.timedelta(seconds=round(self.eta_s))}")
        return " | ".join(parts)

    @property
    def eta_s(self) -> float:
        """Estimated seconds to the last step, without evaluations and saving."""
        remaining = self._state.train_iters - self._state.iteration
        return remaining * self._throughput.seconds_per_step


def _step(line: Mapping[str, Any]) -> float:
    """Return the step of a line; of a line that is no step, one before all others."""
    step = line.get("iteration")
    return step if isinstance(step, int | float) else -math.inf


def _unusual_line(result: StepResult) -> str:
    if not result.num_skipped:
        return f"{result.unusual}; trained on"
    return f"{result.unusual}; skipped: no weight has changed ({result.num_skipped} so far)"


def _without_nan(metrics: Mapping[str, float]) -> dict[str, float | None]:
    """Return metrics for JSON, which has no number that is not finite: null, of a skipped step."""
    return {name: value if math.isfinite(value) else None for name, value in metrics.items()}


def _losses(losses: Mapping[str, float]) -> list[str]:
    return [f"{name} {loss:.4f}" for name, loss in losses.items()]


def _scores(tasks: Mapping[str, float]) -> list[str]:
    return [f"{name} {score:.1f}" for name, score in tasks.items()]
