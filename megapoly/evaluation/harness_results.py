"""Convert the harness's dictionaries to typed results."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from megapoly.errors import EvaluationError
from megapoly.evaluation.local_tasks import PREFIX
from megapoly.evaluation.results import ACCURACIES, Metric, TaskResult
from megapoly.evaluation.tasks import TASKS, EvalTask

_NO_FILTER = "none"


def collect_results(
    raw: Mapping[str, Any], task: EvalTask, members: Mapping[str, Any], limit: int | None = None
) -> Iterator[TaskResult]:
    """Yield the result of a task, or of its members if it is a tag or a group without a mean.

    Args:
        raw: result of ``lm_eval.simple_evaluate``.
        task: the task.
        members: result of ``TaskManager.load`` for it.
        limit: number of questions of each member that were answered; None: all.
    """
    name = PREFIX + task.name if task.name in TASKS else task.harness_task
    leaves = members["tasks"]
    of_group = _metrics(raw.get("groups", {}).get(name, {}))
    if of_group:
        subtasks = {
            leaf.removeprefix(f"{name}_"): _metrics(raw["results"][leaf]) for leaf in leaves
        }
        yield _result(raw, task, of_group, leaves, subtasks, limit)
        return
    for leaf, leaf_task in leaves.items():
        own = task if len(leaves) == 1 and leaf == name else EvalTask(leaf, leaf, leaf)
        yield _result(raw, own, _metrics(raw["results"][leaf]), {leaf: leaf_task}, {}, limit)


def _result(
    raw: Mapping[str, Any],
    task: EvalTask,
    metrics: dict[str, Metric],
    leaves: Mapping[str, Any],
    subtasks: Mapping[str, Mapping[str, Metric]],
    limit: int | None,
) -> TaskResult:
    if not metrics:
        raise EvaluationError(f"the harness reported no numeric metric for `{task.name}`")
    counts = [raw["n-samples"][leaf] for leaf in leaves]
    first = next(iter(leaves))
    config = leaves[first].config
    metric = task.metric or next(iter(metrics))
    is_accuracy = metric.partition(",")[0] in ACCURACIES
    return TaskResult(
        task=task,
        metric=metric,
        metrics=metrics,
        num_questions=sum(count["effective"] for count in counts),
        num_questions_in_split=sum(count["original"] for count in counts),
        num_fewshot=raw["n-shot"][first],
        split=config.test_split or config.validation_split,
        subtasks=subtasks,
        chance=_chance(leaves.values(), limit) if is_accuracy else None,
    )


def _chance(leaves: Iterable[Any], limit: int | None) -> float | None:
    """Return the accuracy of choosing answers at random: the mean of right / all answers.

    Args:
        leaves: tasks of the harness.
        limit: questions of each; None: all.

    Returns:
        None if answers are not chosen from a list.
    """
    shares = []
    for leaf in leaves:
        if leaf.OUTPUT_TYPE != "multiple_choice":
            return None
        for _, doc in leaf.doc_iterator(limit=limit):
            target = leaf.doc_to_target(doc)
            num_right = len(set(target)) if isinstance(target, list) else 1
            shares.append(num_right / len(leaf.doc_to_choice(doc)))
    return math.fsum(shares) / len(shares) if shares else None


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
