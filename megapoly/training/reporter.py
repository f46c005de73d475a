"""What a user sees: progress, ``metrics.jsonl``, TensorBoard. Only rank 0 shows and writes."""

from __future__ import annotations

import contextlib
import datetime
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from torch.utils.tensorboard import SummaryWriter

from megapoly.config.data_sources import MEAN
from megapoly.training.evaluation import Evaluation
from megapoly.training.profiling import disturbed_steps
from megapoly.training.state import TrainState
from megapoly.training.step import StepResult
from megapoly.training.throughput import Throughput, shown

# Validation sets whose losses stand in the line of a step; of more it shows the mean alone, and the
# line of an evaluation is followed by one with all. Of tasks, which have no mean, so many or none.
_INLINE_SETS = 3


class Reporter:
    """Shows and records a run.

    Args:
        state: the run, restored: lines of ``metrics.jsonl`` after its position are dropped.
        num_devices: processes of the job.
        enabled: false on every rank but 0.
    """

    def __init__(self, state: TrainState, *, num_devices: int, enabled: bool) -> None:
        self._state, self._enabled = state, enabled
        self._throughput = Throughput(
            state.config, device_name=state.platform.describe(), num_devices=num_devices
        )
        self._disturbed = disturbed_steps(state.config)
        self._last_loss: dict[str, Evaluation] = {}
        self._last_score: dict[str, float] = {}
        self._resources = contextlib.ExitStack()
        self._console = Console(highlight=False)
        self._metrics: TextIO | None = None
        self._tensorboard: SummaryWriter | None = None
        self._progress: Progress | None = None

    def __enter__(self) -> Reporter:
        if not self._enabled:
            return self
        config, iteration = self._state.config, self._state.iteration
        run_dir = Path(config.run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        path = run_dir / "metrics.jsonl"
        _drop_after(path, iteration)
        self._metrics = self._resources.enter_context(path.open("a"))
        if config.logging.tensorboard:
            self._tensorboard = SummaryWriter(run_dir / "tensorboard", purge_step=iteration + 1)
            self._resources.callback(self._tensorboard.close)
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
        total = self._state.config.training.train_iters
        progress.add_task("train", total=total, completed=self._state.iteration, status="")
        return progress

    def message(self, text: str) -> None:
        """Show a line."""
        if self._enabled:
            self._console.print(text, markup=False, soft_wrap=True)

    def begin(self) -> None:
        """Say what TFLOP/s and MFU are made of."""
        self.message(self._throughput.describe())

    def end(self) -> None:
        """Say how fast the steps were."""
        if (mean := self._throughput.mean()) is not None:
            self.message(mean)

    def step(
        self,
        result: StepResult,
        step_time_s: float,
        evaluations: dict[str, Evaluation],
        details: dict[str, float],
        tasks: Mapping[str, float],
    ) -> None:
        """Record one step.

        Args:
            result: of the step.
            step_time_s: seconds from its start to its end, without evaluation, checkpoint and
                this report.
            evaluations: of the validation sets, if this step had one.
            details: scalars for TensorBoard alone.
            tasks: percent of the benchmark tasks, if this step evaluated any.
        """
        if not self._enabled:
            return
        record = self._record(result, step_time_s, evaluations)
        record |= {f"task/{name}": score for name, score in tasks.items()}
        evaluated = bool(evaluations or tasks)
        assert self._metrics is not None
        self._metrics.write(json.dumps(record) + "\n")
        self._metrics.flush()
        self._last_loss |= evaluations
        self._last_score |= tasks
        self._write_tensorboard(record, details, always=evaluated)
        self._show(record, evaluated)

    def _record(
        self, result: StepResult, step_time_s: float, evaluations: dict[str, Evaluation]
    ) -> dict[str, float]:
        record = {
            "iteration": self._state.iteration,
            "consumed_tokens": self._state.consumed_tokens,
            "lm_loss": result.lm_loss,
            "grad_norm": result.grad_norm,
            "learning_rate": result.learning_rate,
            "step_time_s": step_time_s,
        }
        record |= self._throughput.add_step(
            step_time_s, is_disturbed=self._state.iteration in self._disturbed
        )
        record |= result.aux_losses
        if self._state.platform.is_cuda:
            record["max_memory_allocated_bytes"] = torch.cuda.max_memory_allocated()
        for name, evaluation in evaluations.items():
            record[f"val/{name}/loss"] = evaluation.loss
            record[f"val/{name}/ppl"] = evaluation.ppl
        return record

    def _write_tensorboard(
        self, record: dict[str, float], details: dict[str, float], *, always: bool
    ) -> None:
        iteration = self._state.iteration
        if self._tensorboard is None:
            return
        due = always or iteration % self._state.config.logging.log_interval == 0
        scalars = (record if due else {}) | details
        for name, value in scalars.items():
            if name != "iteration":
                self._tensorboard.add_scalar(name, value, iteration)

    def _show(self, record: dict[str, float], evaluated: bool) -> None:
        state = self._state
        total = state.config.training.train_iters
        assert total is not None
        status = self._status(record)
        if self._progress is not None:
            task = self._progress.task_ids[0]
            self._progress.update(task, completed=state.iteration, status=status)
        due = state.iteration % state.config.logging.log_interval == 0
        last = state.iteration == total
        if evaluated or (self._progress is None and (due or last or state.iteration == 1)):
            step = f"step {state.iteration:>{len(str(total))}}/{total}"
            self.message(f"{step} | {status}")
            more = _losses(self._last_loss) if self._has_many_sets() else []
            more += _scores(self._last_score) if self._has_many_tasks() else []
            if evaluated and more:
                self.message(f"{step} | {' | '.join(more)}")

    def _has_many_sets(self) -> bool:
        return len(self._last_loss) > _INLINE_SETS + 1  # and their mean

    def _has_many_tasks(self) -> bool:
        return len(self._last_score) > _INLINE_SETS

    def _status(self, record: dict[str, float]) -> str:
        total = self._state.config.training.train_iters
        assert total is not None
        parts = [f"loss {record['lm_loss']:.4f}"]
        only = {MEAN: self._last_loss[MEAN]} if self._has_many_sets() else self._last_loss
        parts += _losses(only)
        parts += [] if self._has_many_tasks() else _scores(self._last_score)
        parts += [
            f"lr {record['learning_rate']:.2e}",
            f"grad norm {record['grad_norm']:.3f}",
            *shown(record),
        ]
        seconds = round((total - self._state.iteration) * self._throughput.seconds_per_step)
        parts.append(f"ETA {datetime.timedelta(seconds=seconds)}")
        return " | ".join(parts)


def _losses(evaluations: Mapping[str, Evaluation]) -> list[str]:
    return [f"val/{name} {result.loss:.4f}" for name, result in evaluations.items()]


def _scores(tasks: Mapping[str, float]) -> list[str]:
    return [f"task/{name} {score:.1f}" for name, score in tasks.items()]


def _drop_after(path: Path, iteration: int) -> None:
    """Keep the lines of a metrics file up to a step; a half-written last line goes too."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["iteration"] <= iteration:
                kept.append(line)
        except ValueError:
            break
    temporary = path.with_suffix(".jsonl.partial")
    temporary.write_text("".join(f"{line}\n" for line in kept))
    temporary.replace(path)
