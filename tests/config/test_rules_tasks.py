"""Each rule of tasks refuses a valid configuration with one change that breaks it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from megapoly.config.rules import tasks

TASKS = {"training.eval_tasks": ["arc_easy", "piqa"]}
EVERY = {"training.eval_tasks_interval": 50}
CASES: list[dict[str, Any]] = [
    dict(
        rule="tasks_have_an_interval",
        wrong=TASKS,
        words=["(arc_easy, piqa)", "`training.eval_tasks_interval` (0)", "null"],
        right=TASKS | EVERY,
    ),
    dict(
        rule="tasks_have_an_interval",
        wrong=EVERY,
        words=["(50)", "`training.eval_tasks` (null)", "set it to 0"],
    ),
    dict(
        rule="tasks_have_an_interval",
        wrong=EVERY | {"training.eval_tasks": []},
        words=["([])", "[arc_easy]"],
    ),
    dict(
        rule="task_options_have_effect",
        wrong={"training.eval_tasks_limit": 10, "training.eval_tasks_data": "HERE"},
        words=["`training.eval_tasks_limit` (10), `training.eval_tasks_data`", "no effect"],
        right=TASKS
        | EVERY
        | {"training.eval_tasks_limit": None, "training.eval_tasks_data": "HERE"},
    ),
    dict(
        rule="task_data_exists",
        base=TASKS | EVERY,
        wrong={"training.eval_tasks_data": "HERE/tokens.bin"},
        words=["tokens.bin", "not a folder"],
        right={"training.eval_tasks_data": "HERE"},
    ),
    dict(
        rule="harness_is_installed",
        wrong=TASKS | EVERY | {"lm_eval_available": False},
        words=["(arc_easy, piqa)", "pip install 'megapoly[eval]'"],
        right={"lm_eval_available": False},
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["rule"])
def test_breaks_exactly_its_rule(
    case: dict[str, Any], assert_breaks_exactly: Callable[..., None]
) -> None:
    assert_breaks_exactly(**case)


def test_every_rule_has_a_case() -> None:
    assert {rule.__name__ for rule in tasks.RULES} == {case["rule"] for case in CASES}
