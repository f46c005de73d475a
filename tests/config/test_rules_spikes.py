"""Each rule of spikes refuses a valid configuration with one change that breaks it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from megapoly.config.rules import spikes
from megapoly.config.rules.facts import Facts

SKIP = {"training.spike_action": "skip"}
CASES: list[dict[str, Any]] = [
    dict(
        rule="only_skipping_has_a_budget",
        wrong={"training.spike_max_skips": 3},
        words=["`training.spike_max_skips` (3)", "no effect", "(report)", "take skip"],
        right={"training.spike_max_skips": 3} | SKIP,
    ),
    dict(
        rule="budget_can_be_used_up",
        base=SKIP,
        wrong={"training.spike_window": 8},
        words=["(8)", "must be below", "1 is usual"],
        right={"training.spike_window": 9},
    ),
    dict(
        rule="skipped_batches_are_steps",
        wrong={"training.skip_batches": ["9-3", 7]},
        words=["(9-3)", "1200-1210"],
        right={"training.skip_batches": ["3-9", 7]},
    ),
    dict(
        rule="skipped_batches_are_steps",
        wrong={"training.skip_batches": []},
        words=["([])", "leave it null"],
    ),
    dict(
        rule="numbers_are_in_range",
        wrong={"training.spike_threshold": 0.5},
        words=["`training.spike_threshold` (0.5)", "at least 1"],
    ),
    dict(
        rule="numbers_are_in_range",
        wrong={"training.spike_window": 1},
        words=["`training.spike_window` (1)", "at least 2"],
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["rule"])
def test_rule(case: dict[str, Any], assert_breaks_exactly: Callable[..., None]) -> None:
    assert_breaks_exactly(**case)


def test_every_rule_is_broken_by_a_case(facts_of: Callable[[dict[str, Any]], Facts]) -> None:
    assert {rule.__name__ for rule in spikes.RULES} <= {case["rule"] for case in CASES}
