"""Each rule of schedule refuses a valid configuration with one change that breaks it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from megapoly.config.rules import schedule

WARMUP, DECAY = "optimizer.lr_warmup_iters", "optimizer.lr_decay_iters"
STYLE, WSD = "optimizer.lr_decay_style", "optimizer.lr_wsd_decay_iters"

CASES: list[dict[str, Any]] = [
    dict(
        rule="run_has_one_length",
        wrong={"training.train_iters": None},
        words=["exactly one", "neither"],
    ),
    dict(
        rule="run_has_one_length",
        wrong={"training.train_tokens": 9999},
        words=["exactly one", "both (100 and 9999)"],
        right={"training.train_iters": None, "training.train_tokens": 9999},
    ),
    *(
        dict(
            rule="parts_have_one_length",
            wrong={f"optimizer.{name}_iters": 2, f"optimizer.{name}_tokens": 9000, **more},
            words=["(2)", "(9000)", "keep one"],
            right={f"optimizer.{name}_tokens": 9000, **more},
        )
        for name, more in (
            ("lr_warmup", {}),
            ("lr_decay", {}),
            ("lr_wsd_decay", {STYLE: "WSD"}),
        )
    ),
    dict(
        rule="batch_divides",
        wrong={"training.global_batch_size": 12, "world_size": 2},
        words=["(12)", "4 * 2 (8)", "8 and 16"],
        right={"training.global_batch_size": 16, "world_size": 2},
    ),
    dict(
        rule="learning_rates_are_ordered",
        wrong={"optimizer.min_lr": 2e-3},
        words=["(0.002)", "(0.001)", "0.0001"],
        right={"optimizer.min_lr": 1e-3},
    ),
    dict(
        rule="learning_rates_are_ordered",
        wrong={"optimizer.lr_warmup_init": 2e-3, WARMUP: 10},
        words=["`optimizer.lr_warmup_init` (0.002)", "(0.001)"],
        right={"optimizer.lr_warmup_init": 1e-3, WARMUP: 10},
    ),
    dict(
        rule="warmup_has_steps",
        wrong={"optimizer.lr_warmup_init": 1e-4},
        words=["`optimizer.lr_warmup_init` (0.0001)", "without a warm-up"],
        right={"optimizer.lr_warmup_init": 1e-4, "optimizer.lr_warmup_tokens": 20_480},
    ),
    dict(
        rule="decay_of_norms_has_a_rate",
        wrong={"optimizer.decay_norms": True, "optimizer.weight_decay": 0.0},
        words=["`optimizer.decay_norms` (True)", "(0)"],
        right={"optimizer.decay_norms": True},
    ),
    dict(
        rule="warmup_ends_before_decay",
        wrong={WARMUP: 100, DECAY: 100},
        words=["(100 steps)", "at most 99"],
        right={WARMUP: 99, DECAY: 100},
    ),
    dict(
        rule="warmup_ends_before_decay",
        wrong={"optimizer.lr_warmup_tokens": 20_480, DECAY: 10},
        words=["(10 steps)", "at most 9"],
        right={"optimizer.lr_warmup_tokens": 18_432, DECAY: 10},
    ),
    dict(
        rule="wsd_has_its_options",
        wrong={STYLE: "WSD"},
        words=["(WSD)", WSD],
        right={STYLE: "WSD", WSD: 10},
    ),
    dict(rule="wsd_has_its_options", wrong={WSD: 10}, words=["(10)", "(cosine)", "take WSD"]),
    dict(
        rule="wsd_has_its_options",
        wrong={"optimizer.lr_wsd_decay_style": "cosine"},
        words=["`optimizer.lr_wsd_decay_style` (cosine)"],
        right={"optimizer.lr_wsd_decay_style": "cosine", STYLE: "WSD", WSD: 10},
    ),
    dict(
        rule="wsd_decay_fits",
        wrong={STYLE: "WSD", WSD: 91, WARMUP: 10},
        words=["(91 steps)", "(10)", "(100)", "90 steps"],
        right={STYLE: "WSD", WSD: 90, WARMUP: 10},
    ),
    dict(
        rule="constant_rate_has_no_decay",
        wrong={STYLE: "constant", DECAY: 50},
        words=["(50 steps)", "(constant)"],
        right={STYLE: "constant", DECAY: 100},
    ),
    dict(
        rule="steps_can_be_counted",
        wrong={"training.train_iters": None, "training.train_tokens": 10**13},
        words=["`training.train_tokens` (10000000000000) is 4882812500 steps of 2048 tokens"],
        right={"training.train_iters": None, "training.train_tokens": 10**12},
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["rule"])
def test_breaks_exactly_its_rule(
    case: dict[str, Any], assert_breaks_exactly: Callable[..., None]
) -> None:
    assert_breaks_exactly(**case)


def test_every_rule_has_a_case() -> None:
    assert {case["rule"] for case in CASES} == {rule.__name__ for rule in schedule.RULES}
