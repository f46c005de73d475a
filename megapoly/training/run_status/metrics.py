"""The metrics that a run exports, in Prometheus's conventions: base units, prefix ``megapoly_``.

Prometheus's text and OTLP have the same names, so that alerts and dashboards hold for both.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from megapoly.training.run_status.record import ENDED, RUNNING, RunStatus

Sample = tuple[Mapping[str, str], float]


@dataclass(frozen=True)
class Metric:
    """A metric, which has the labels ``run`` (the path of its folder) and ``host`` (rank 0's).

    Args:
        name: as Prometheus has it.
        help: one line: what it is, and its unit.
        samples: values in a status, each with its further labels; none while it is not known.
    """

    name: str
    help: str
    samples: Callable[[RunStatus], Iterable[Sample]]


def run_label(status: RunStatus) -> str:
    """Return the path of the run's folder, for its own process.

    A relative one would be that of another user's run, too, and node_exporter shows neither of two
    files with the same names and labels.
    """
    return os.path.abspath(status.run_dir)


def samples_of(metric: Metric, status: RunStatus) -> Iterator[Sample]:
    """Yield the samples of a metric with all of their labels."""
    common = {"run": run_label(status), "host": status.host or ""}
    for labels, value in metric.samples(status):
        yield {**common, **labels}, float(value)


def _one(field: str, name: str, text: str) -> Metric:
    """Return the metric of a field that is a number or null."""

    def samples(status: RunStatus) -> Iterator[Sample]:
        value = getattr(status, field)
        if value is not None:
            yield {}, value

    return Metric(name, text, samples)


def _each(field: str, label: str, name: str, text: str) -> Metric:
    """Return the metric of a field that is a dictionary of numbers."""

    def samples(status: RunStatus) -> Iterator[Sample]:
        for key, value in getattr(status, field).items():
            yield {label: key}, math.nan if value is None else value

    return Metric(name, text, samples)


def _checkpoint(field: str, name: str, text: str) -> Metric:
    def samples(status: RunStatus) -> Iterator[Sample]:
        value = getattr(status.checkpoint, field, None)
        if value is not None:
            yield {}, value

    return Metric(name, text, samples)


def _states(status: RunStatus) -> Iterator[Sample]:
    for state in (*RUNNING, *ENDED):
        yield {"state": state}, float(state == status.state)


def _info(status: RunStatus) -> Iterator[Sample]:
    yield (
        {
            "layout": status.layout or "",
            "version": status.megapoly_version or "",
            **{name: status.job[name] for name in ("slurm_job_id", "pod") if name in status.job},
        },
        1.0,
    )


METRICS: tuple[Metric, ...] = (
    Metric("megapoly_run_state", "1 for the state in which the run is, 0 for others.", _states),
    Metric("megapoly_run_info", "Always 1; layout, version and job are labels.", _info),
    _one("updated", "megapoly_updated_timestamp_seconds", "When these metrics were written."),
    _one("started", "megapoly_start_timestamp_seconds", "When this start of the job began."),
    _one(
        "expected_by",
        "megapoly_expected_by_timestamp_seconds",
        "By when the next sign of life must come; the run hangs after it.",
    ),
    _one("last_step", "megapoly_last_step_timestamp_seconds", "When the last step ended."),
    _one("step", "megapoly_step", "Steps made."),
    _one("train_iters", "megapoly_train_steps", "Steps of the whole run."),
    _one("eta_s", "megapoly_remaining_seconds", "Estimated time to the end of the run."),
    _one("step_time_s", "megapoly_step_seconds", "Time of the last step."),
    _one("tokens_per_second", "megapoly_tokens_per_second", "Speed of the last step."),
    _one("mfu", "megapoly_mfu_ratio", "Model FLOP/s utilization of the last step, 0 to 1."),
    # No counter: it goes back when a run resumes from an earlier step.
    _one("consumed_tokens", "megapoly_consumed_tokens", "Tokens that the run has trained on."),
    _one("loss", "megapoly_loss", "Training loss of the last step."),
    _one("grad_norm", "megapoly_gradient_norm", "Norm of the gradient of the last step."),
    _one("learning_rate", "megapoly_learning_rate", "Learning rate of the last step."),
    _each("validation", "set", "megapoly_validation_loss", "Last loss of a validation set."),
    _each("tasks", "task", "megapoly_task_score_percent", "Last score of a benchmark task."),
    _one("spikes", "megapoly_spikes", "Steps of the run with a spike, trained on or not."),
    _one("skipped_steps", "megapoly_skipped_steps", "Steps of the run that were left out."),
    _one(
        "slowest_rank_ratio",
        "megapoly_slowest_rank_ratio",
        "Time of the slowest rank over the median of its peers.",
    ),
    _one("memory_bytes", "megapoly_memory_bytes", "Host memory of rank 0's process."),
    _one("gpu_memory_bytes", "megapoly_gpu_memory_max_bytes", "Most memory of rank 0's GPU."),
    _checkpoint("step", "megapoly_checkpoint_step", "Step of the newest checkpoint."),
    _checkpoint(
        "time", "megapoly_checkpoint_timestamp_seconds", "When the newest checkpoint was complete."
    ),
    _one(
        "save_interval",
        "megapoly_checkpoint_interval_steps",
        "Steps between checkpoints; 0: none before the end.",
    ),
    _one("world_size", "megapoly_processes", "Processes of the job."),
    _one("exit_status", "megapoly_exit_status", "Exit status of a run that has failed."),
)
