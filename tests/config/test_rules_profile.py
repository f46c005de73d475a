"""Each rule of profile refuses a valid configuration with one change that breaks it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from megapoly.config.rules import profile

PROFILE = {"logging.profile": True}
CASES: list[dict[str, Any]] = [
    dict(
        rule="profile_options_have_effect",
        wrong={"logging.profile_step_end": 20, "logging.profile_ranks": [1]},
        words=["`logging.profile_step_end` (20)", "`logging.profile_ranks` ([1])", "no effect"],
        right=PROFILE | {"logging.profile_step_end": 20},
    ),
    dict(
        rule="profile_steps_are_in_the_run",
        wrong=PROFILE | {"logging.profile_step_end": 9},
        words=["(9)", "(10)", "10 traces one step"],
        right=PROFILE | {"logging.profile_step_end": 10},
    ),
    dict(
        rule="profile_steps_are_in_the_run",
        wrong=PROFILE | {"training.train_iters": 11},
        words=["(10)", "(12)", "which has 11; 9 and 11"],
        right=PROFILE | {"training.train_iters": 12},
    ),
    dict(
        rule="profile_steps_are_in_the_run",
        wrong=PROFILE | {"training.train_iters": 1},
        words=["which has 1; 1 and 1"],
    ),
    dict(
        rule="profile_ranks_exist",
        wrong=PROFILE | {"logging.profile_ranks": [0, 2], "world_size": 2},
        words=["has 2", "0 to 1"],
        right=PROFILE | {"logging.profile_ranks": [1], "world_size": 2},
    ),
    dict(
        rule="profile_ranks_exist",
        wrong=PROFILE | {"logging.profile_ranks": [-1]},
        words=["has -1", "remove it"],
    ),
    dict(
        rule="profile_ranks_exist",
        wrong=PROFILE | {"logging.profile_ranks": [0, 0]},
        words=["([0, 0])", "twice"],
    ),
    dict(
        rule="profile_ranks_exist",
        wrong=PROFILE | {"logging.profile_ranks": []},
        words=["([])", "name a rank"],
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["rule"])
def test_breaks_exactly_its_rule(
    case: dict[str, Any], assert_breaks_exactly: Callable[..., None]
) -> None:
    assert_breaks_exactly(**case)


def test_every_rule_has_a_case() -> None:
    assert {case["rule"] for case in CASES} == {rule.__name__ for rule in profile.RULES}
