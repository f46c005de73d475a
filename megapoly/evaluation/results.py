"""Results of an evaluation, and their JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megapoly.evaluation.tasks import GROUPS, EvalTask, Selection

# Metrics between 0 and 1, which are shown in percent.
PROPORTIONS = frozenset(
    {"acc", "acc_norm", "acc_bytes", "acc_mutual_info", "em", "exact_match", "f1"}
)


@dataclass(frozen=True)
class Metric:
    """A figure as the harness gives it.

    Args:
        value: the figure; a proportion is between 0 and 1.
        stderr: its standard error; None where the harness has none, as for a single question.
    """

    value: float
    stderr: float | None


@dataclass(frozen=True)
class TaskResult:
    """Result on one task.

    Args:
        task: what was run.
        metric: the one that ``score`` is of.
        metrics: every metric of the harness by name; with its filter, ``name,filter``, where the
            task has filters.
        num_questions: questions that were asked.
        num_questions_in_split: questions that there are.
        num_fewshot: answered examples before each.
        split: of the data.
        subtasks: metrics of each member, of a group such as MMLU.
    """

    task: EvalTask
    metric: str
    metrics: Mapping[str, Metric]
    num_questions: int
    num_questions_in_split: int
    num_fewshot: int
    split: str
    subtasks: Mapping[str, Mapping[str, Metric]]

    @property
    def in_percent(self) -> bool:
        """Whether the score is a percentage."""
        return self.metric.partition(",")[0] in PROPORTIONS

    @property
    def score(self) -> float:
        """The metric, in percent if it is a proportion."""
        return self.metrics[self.metric].value * (100 if self.in_percent else 1)

    @property
    def stderr(self) -> float | None:
        """Standard error of the score, in its unit."""
        stderr = self.metrics[self.metric].stderr
        return None if stderr is None else stderr * (100 if self.in_percent else 1)


@dataclass(frozen=True)
class Skipped:
    """A task that was not run for want of its data.

    Args:
        task: the task.
        missing: files that the folder lacks.
    """

    task: EvalTask
    missing: tuple[str, ...]


@dataclass(frozen=True)
class HarnessWarning:
    """A warning of the harness.

    Args:
        text: of the first of its kind.
        count: how often a warning came from that line of the harness.
    """

    text: str
    count: int


@dataclass(frozen=True)
class TaskResults:
    """Results of one evaluation.

    Args:
        selection: what was asked for.
        tasks: results in its order.
        skipped: tasks without data.
        limit: only so many questions of each task (of each subject of MMLU), the first, were asked.
        warnings: what the harness warned of.
        seeds: of random, numpy, torch and the choice of few-shot examples.
        versions: of the libraries.
        date: when it began, ISO 8601, UTC.
        seconds: how long it took.
    """

    selection: Selection
    tasks: tuple[TaskResult, ...]
    skipped: tuple[Skipped, ...]
    limit: int | None
    warnings: tuple[HarnessWarning, ...]
    seeds: Mapping[str, int]
    versions: Mapping[str, str]
    date: str
    seconds: float

    def find(self, name: str) -> TaskResult | None:
        """Return the result of a task, None if it was not run."""
        return next((result for result in self.tasks if result.task.name == name), None)

    def average(self, names: tuple[str, ...] | None = None) -> float | None:
        """Return the mean score, percent, each task counting the same: the paper's "Avg.".

        Args:
            names: tasks; None for all that were run.

        Returns:
            None if one was not run, if one's score is no percentage, or if there is none.
        """
        results = self.tasks if names is None else [self.find(name) for name in names]
        scores = [result.score for result in results if result and result.in_percent]
        if not scores or len(scores) < len(results):
            return None
        return math.fsum(scores) / len(scores)


def as_json(
    model: Mapping[str, Any],
    *,
    tasks: TaskResults | None = None,
    perplexity: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return everything about an evaluation as plain JSON values.

    Args:
        model: what was evaluated and how: path, dtype and so on; under ``model``.
        tasks: results on benchmarks, under several names; None: no benchmarks.
        perplexity: of :func:`megapoly.evaluation.perplexity.perplexity_record`, under
            ``perplexity``; None: none.
    """
    content: dict[str, Any] = {"model": dict(model)}
    if tasks is not None:
        content |= _tasks_as_json(tasks)
    if perplexity is not None:
        content["perplexity"] = dict(perplexity)
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write :func:`as_json` to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")


def _tasks_as_json(results: TaskResults) -> dict[str, Any]:
    selection = results.selection
    return {
        "date": results.date,
        "seconds": round(results.seconds, 3),
        "asked_for": list(selection.words),
        "limit": results.limit,
        "averages": {
            "all": results.average(),
            **{table: results.average(GROUPS[table]) for table in selection.tables},
        },
        "tasks": {result.task.name: _task_as_json(result) for result in results.tasks},
        "skipped": {skipped.task.name: list(skipped.missing) for skipped in results.skipped},
        "warnings": [dataclasses.asdict(warning) for warning in results.warnings],
        "seeds": dict(results.seeds),
        "versions": dict(results.versions),
    }


def _task_as_json(result: TaskResult) -> dict[str, Any]:
    content = {
        "column": result.task.column,
        "harness_task": result.task.harness_task,
        "split": result.split,
        "num_fewshot": result.num_fewshot,
        "num_questions": result.num_questions,
        "num_questions_in_split": result.num_questions_in_split,
        "metric": result.metric,
        "score": result.score,
        "stderr": result.stderr,
        "unit": "%" if result.in_percent else None,
        "metrics": _metrics_as_json(result.metrics),
    }
    if result.subtasks:
        content["subtasks"] = {
            name: _metrics_as_json(metrics) for name, metrics in result.subtasks.items()
        }
    return content


def _metrics_as_json(metrics: Mapping[str, Metric]) -> dict[str, Any]:
    return {name: dataclasses.asdict(metric) for name, metric in metrics.items()}
