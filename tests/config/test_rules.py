"""The rule on ranges, and all rules together."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

from megapoly.config.options import OPTIONS
from megapoly.config.rules import RULES, check, find_problems
from megapoly.config.rules.facts import Facts
from megapoly.config.rules.values import (
    ABOVE_ZERO,
    AT_LEAST_ONE,
    AT_LEAST_ZERO,
    FRACTIONS,
    SEEDS,
    numbers_are_in_range,
)
from megapoly.errors import ConfigError
from megapoly.platform.machine import CPU

FactsOf = Callable[[dict[str, Any]], Facts]
BOUNDS = [
    *((key, 0, "at least 1", 1) for key in AT_LEAST_ONE),
    *((key, -1, "at least 0", 0) for key in AT_LEAST_ZERO),
    *((key, 0.0, "above 0", 1e-9) for key in ABOVE_ZERO),
    *((key, 1.0, "below 1", 0.0) for key in FRACTIONS),
    *((key, -0.1, "at least 0", 0.5) for key in FRACTIONS),
    *((key, -1, "at least 0", 0) for key in SEEDS),
    *((key, 2**32, "below 4294967296", 2**32 - 1) for key in SEEDS),
]
BASES = {
    "dense": {},
    "moe": {"model.num_moe_experts": 8, "model.moe_ffn_hidden_size": 384},
    "tp": {"parallel.tensor_model_parallel_size": 2, "world_size": 2},
    "recompute": {
        "parallel.recompute_granularity": "full",
        "parallel.recompute_method": "uniform",
        "parallel.recompute_num_layers": 1,
    },
    "wsd": {"optimizer.lr_decay_style": "WSD", "optimizer.lr_wsd_decay_iters": 10},
}
ONE_CPU = {
    "world_size": 1,
    "machine": CPU,
    "tokenizer_vocab_size": 4096,
}


@pytest.mark.parametrize(("key", "wrong", "words", "right"), BOUNDS)
def test_numbers_are_in_range(
    facts_of: FactsOf, key: str, wrong: float, words: str, right: float
) -> None:
    assert list(numbers_are_in_range(facts_of({key: right}))) == []
    (message,) = numbers_are_in_range(facts_of({key: wrong}))
    assert message.startswith(f"`{key}` ({wrong}) must be ") and words in message


def test_every_number_has_a_range() -> None:
    numbers = {key for key, option in OPTIONS.items() if option.base in (int, float)}
    ranged = {*AT_LEAST_ONE, *AT_LEAST_ZERO, *ABOVE_ZERO, *FRACTIONS, *SEEDS}
    assert numbers - ranged == {"model.activation_order"}


@pytest.mark.parametrize("order", [1, 5])
def test_activation_order_is_known(assert_breaks_exactly: Callable[..., None], order: int) -> None:
    assert_breaks_exactly(
        rule="activation_order_is_known",
        wrong={"model.activation_order": order},
        words=[f"({order})", "2, 3 or 4", f"{2 if order == 1 else 4} is the nearest"],
        right={"model.activation_order": 4},
    )


@pytest.mark.parametrize("key", [*AT_LEAST_ONE, *AT_LEAST_ZERO])
@pytest.mark.parametrize("base", BASES.values(), ids=BASES)
def test_no_rule_trips_over_a_nonsensical_number(
    facts_of: FactsOf, base: dict[str, Any], key: str
) -> None:
    for value in (0, -1):
        facts = facts_of(base | {key: value})
        problems = [problem for rule in RULES for problem in rule(facts)]
        is_wrong = value < 0 or key in AT_LEAST_ONE
        assert any(problem.startswith(f"`{key}` ({value}) must be at") for problem in problems) == (
            is_wrong
        )


def test_five_mistakes_give_five_messages(facts_of: FactsOf) -> None:
    mistakes = {
        "model.num_layers": 0,
        "model.activation": "swigl",
        "model.activation_order": 7,
        "optimizer.min_lr": 1.0,
        "training.device": "cuda",
    }
    config = facts_of(mistakes).config
    assert len(find_problems(config, **ONE_CPU)) == 5
    with pytest.raises(ConfigError) as caught:
        check(config, **ONE_CPU)
    assert len(caught.value.problems) == 5
    for key in mistakes:
        assert f"`{key}`" in str(caught.value)


def test_right_configuration_passes_and_is_left_as_it_is(facts_of: FactsOf) -> None:
    config = facts_of(BASES["moe"]).config
    before = copy.deepcopy(config)
    check(config, **ONE_CPU)
    assert config == before


def test_rules_have_names_of_their_own() -> None:
    names = [rule.__name__ for rule in RULES]
    assert len(names) == len(set(names))
