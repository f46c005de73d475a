"""Results of an evaluation, and their JSON form."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megapoly.evaluation.tasks import GROUPS, EvalTask, Selection

# Metrics between 0 and 1, shown in percent.
ACCURACIES = frozenset({"acc", "acc_norm", "acc_bytes", "acc_mutual_info"})
PROPORTIONS = ACCURACIES | {"em", "exact_match", "f1"}


@dataclass(frozen=True)
class Metric:
    """Value of a metric from the harness.

    Args:
        value: the value; a proportion is between 0 and 1.
        stderr: its standard error; None if the harness has none, as for a single question.
    """

    value: float
    stderr: float | None


@dataclass(frozen=True)
class TaskResult:
    """Result of one task.

    Args:
        task: the task.
        metric: name of the metric that ``score`` shows.
        metrics: every metric of the harness by name, or by ``name,filter`` if the task has filters.
        num_questions: number of questions that were answered.
        num_questions_in_split: number of questions in the split.
        num_fewshot: answered examples before each question.
        split: split of the data.
        subtasks: metrics of each member of a group such as MMLU.
        chance: accuracy of choosing answers at random, 0 to 1; None for other metrics.
    """

    task: EvalTask
    metric: str
    metrics: Mapping[str, Metric]
    num_questions: int
    num_questions_in_split: int
    num_fewshot: int
    split: str
    subtasks: Mapping[str, Mapping[str, Metric]]
    chance: float | None

    @property
    def in_percent(self) -> bool:
        """Whether the score is a percentage."""
        return self.metric.partition(",")[0] in PROPORTIONS

    @property
    def score(self) -> float:
        """Value of the metric, in percent if it is a proportion."""
        return self.metrics[self.metric].value * (100 if self.in_percent else 1)

    @property
    def stderr(self) -> float | None:
        """Standard error of the score, in its unit."""
        stderr = self.metrics[self.metric].stderr
        return None if stderr is None else stderr * (100 if self.in_percent else 1)

    @property
    def chance_score(self) -> float | None:
        """Score of choosing answers at random, in percent."""
        return None if self.chance is None else 100 * self.chance


@dataclass(frozen=True)
class Skipped:
    """A task that was skipped because its data is missing.

    Args:
        task: the task.
        missing: files that are missing in the folder.
    """

    task: EvalTask
    missing: tuple[str, ...]


@dataclass(frozen=True)
class HarnessWarning:
    """A warning of the harness.

    Args:
        text: text of the first warning from a line of the harness's code.
        count: number of warnings from that line.
    """

    text: str
    count: int


@dataclass(frozen=True)
class TaskResults:
    """Results of one evaluation.

    Args:
        selection: the requested tasks.
        tasks: results, in the order of the selection.
        skipped: tasks without data.
        limit: number of questions per task (for MMLU per subject), from the first; None: all.
        warnings: warnings of the harness.
        seeds: seeds of random, numpy, torch and the choice of few-shot examples.
        versions: versions of the libraries.
        date: start of the evaluation, ISO 8601, UTC.
        seconds: duration.
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
        """Return the result of a task; None if it was not run."""
        return next((result for result in self.tasks if result.task.name == name), None)

    def average(self, names: tuple[str, ...] | None = None) -> float | None:
        """Return the mean score in percent with equal weight for each task: the paper's "Avg.".

        Args:
            names: tasks; None for all that were run.

        Returns:
            None if a task was not run, a score is not a percentage, or there is no task.
        """
        return _mean([result.score for result in self._in_percent(names)])

    def average_stderr(self, names: tuple[str, ...] | None = None) -> float | None:
        """Return the standard error of :meth:`average`; the errors of tasks are independent.

            sqrt(sum_t stderr_t^2) / tasks

        Returns:
            None without a mean, or if the error of a task is unknown.
        """
        errors = [result.stderr for result in self._in_percent(names)]
        known = [error for error in errors if error is not None]
        if not known or len(known) < len(errors):
            return None
        return math.hypot(*known) / len(known)

    def average_chance(self, names: tuple[str, ...] | None = None) -> float | None:
        """Return the mean score of choosing answers at random; None if one is unknown."""
        return _mean([result.chance_score for result in self._in_percent(names)])

    def _in_percent(self, names: tuple[str, ...] | None) -> list[TaskResult]:
        """Return the results that have a mean; none if one is missing or not a percentage."""
        results = self.tasks if names is None else [self.find(name) for name in names]
        found = [result for result in results if result and result.in_percent]
        return found if len(found) == len(results) else []


def _mean(values: Sequence[float | None]) -> float | None:
    """Return the mean; None without values, or if one is None."""
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known and len(known) == len(values) else None


def as_json(
    model: Mapping[str, Any],
    *,
    tasks: TaskResults | None = None,
    perplexity: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return everything about an evaluation as plain JSON values.

    Args:
        model: model and how it was evaluated: path, dtype and so on; stored under ``model``.
        tasks: results of benchmarks, stored under several names; None if not evaluated.
        perplexity: from :func:`megapoly.evaluation.perplexity.perplexity_record`, stored under
            ``perplexity``; None if not evaluated.
    """
    content: dict[str, Any] = {"model": dict(model)}
    if tasks is not None:
        content |= _tasks_as_json(tasks)
    if perplexity is not None:
        content["perplexity"] = dict(perplexity)
    return content


def write_results(path: Path, content: Mapping[str, Any]) -> None:
    """Write the content of :func:`as_json` to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")


def _tasks_as_json(results: TaskResults) -> dict[str, Any]:
    selection = results.selection
    return {
        "date": results.date,
        "seconds": round(results.seconds, 3),
        "asked_for": list(selection.names),
        "limit": results.limit,
        **{
            name: {
                "all": average(),
                **{table: average(GROUPS[table]) for table in selection.tables},
            }
            for name, average in (
                ("averages", results.average),
                ("averages_stderr", results.average_stderr),
                ("averages_chance", results.average_chance),
            )
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
        "chance": result.chance_score,
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
