"""Convert the harness's dictionaries to typed results."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from megapoly.errors import EvaluationError
from megapoly.evaluation.local_tasks import PREFIX
from megapoly.evaluation.results import Metric, TaskResult
from megapoly.evaluation.tasks import TASKS, EvalTask

_NO_FILTER = "none"


def collect_results(
    raw: Mapping[str, Any], task: EvalTask, members: Mapping[str, Any]
) -> Iterator[TaskResult]:
    """Yield the result of a task, or of its members if it is a tag or a group without a mean.

    Args:
        raw: result of ``lm_eval.simple_evaluate``.
        task: the task.
        members: result of ``TaskManager.load`` for it.
    """
    name = PREFIX + task.name if task.name in TASKS else task.harness_task
    leaves = members["tasks"]
    of_group = _metrics(raw.get("groups", {}).get(name, {}))
    if of_group:
        subtasks = {
            leaf.removeprefix(f"{name}_"): _metrics(raw["results"][leaf]) for leaf in leaves
        }
        yield _result(raw, task, of_group, leaves, subtasks)
        return
    for leaf, leaf_task in leaves.items():
        own = task if len(leaves) == 1 and leaf == name else EvalTask(leaf, leaf, leaf)
        yield _result(raw, own, _metrics(raw["results"][leaf]), {leaf: leaf_task}, {})


def _result(
    raw: Mapping[str, Any],
    task: EvalTask,
    metrics: dict[str, Metric],
    leaves: Mapping[str, Any],
    subtasks: Mapping[str, Mapping[str, Metric]],
) -> TaskResult:
    if not metrics:
        raise EvaluationError(f"the harness reported no numeric metric for `{task.name}`")
    counts = [raw["n-samples"][leaf] for leaf in leaves]
    first = next(iter(leaves))
    config = leaves[first].config
    return TaskResult(
        task=task,
        metric=task.metric or next(iter(metrics)),
        metrics=metrics,
        num_questions=sum(count["effective"] for count in counts),
        num_questions_in_split=sum(count["original"] for count in counts),
        num_fewshot=raw["n-shot"][first],
        split=config.test_split or config.validation_split,
        subtasks=subtasks,
    )


def _metrics(reported: Mapping[str, Any]) -> dict[str, Metric]:
    """Return metrics from entries ``name,filter`` and ``name_stderr,filter``."""
    metrics = {}
    for key, value in reported.items():
        name, comma, filter_name = key.partition(",")
        if not comma or name.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        stderr = reported.get(f"{name}_stderr,{filter_name}")
        label = name if filter_name == _NO_FILTER else key
        metrics[label] = Metric(
            float(value), float(stderr) if isinstance(stderr, (int, float)) else None
        )
    return metrics
