"""The rule on ranges, and all rules together."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any, get_args

import pytest

from megapoly.config.options import OPTIONS, Option, options_of
from megapoly.config.rules import RULES, check, find_problems
from megapoly.config.rules.facts import Facts
from megapoly.config.rules.values import (
    ABOVE_ZERO,
    AT_LEAST_ONE,
    AT_LEAST_ZERO,
    ENTRY_RANGES,
    FRACTIONS,
    RANGES,
    SEEDS,
    numbers_are_in_range,
)
from megapoly.errors import ConfigError
from megapoly.ops.arguments import check_eps
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
ENTRIES = [key for key, option in OPTIONS.items() if option.entry is not None]
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
    """Of fields, lists and entries of the schema; the others have rules of their own."""
    ranged = {*RANGES, *(f"{key}.{name}" for key in ENTRIES for name in ENTRY_RANGES)}
    assert numbers_of(OPTIONS) - ranged == {
        *("model.activation_order", "logging.profile_ranks", "training.skip_batches")
    }


def numbers_of(options: Mapping[str, Option]) -> set[str]:
    """Fields that hold a number, wherever in their type."""
    found = {key for key, option in options.items() if {int, float} & types_in(option.type)}
    for option in options.values():
        if option.entry is not None:
            found |= numbers_of(options_of(option.entry, f"{option.key}."))
    return found


def types_in(hint: Any) -> set[Any]:
    return {hint, *(inner for each in get_args(hint) for inner in types_in(each))}


@pytest.mark.parametrize("key", RANGES)
def test_both_ends_of_every_range(facts_of: FactsOf, key: str) -> None:
    """The default is inside, the ends are as stated, and what lies beyond them is refused."""
    range_, whole = RANGES[key], OPTIONS[key].base is int
    default = OPTIONS[key].default
    assert default is None or default in range_
    assert -math.inf < range_.least < range_.most < math.inf
    small = 1 if whole else range_.most * 1e-9
    for bound, is_open, inside in (
        (range_.least, range_.open_below, small),
        (range_.most, range_.open_above, -small),
    ):
        right, wrong = (bound + inside, bound) if is_open else (bound, bound - inside)
        assert list(numbers_are_in_range(facts_of({key: right}))) == []
        (message,) = numbers_are_in_range(facts_of({key: wrong}))
        assert message == f"`{key}` ({wrong}) must be {range_}"


def test_range_of_eps_is_that_of_the_operators() -> None:
    range_ = RANGES["model.activation_eps"]
    for eps in (range_.least, range_.most):
        check_eps(eps)
    for eps in (range_.least / 2, range_.most * 2):
        with pytest.raises(ValueError, match="must be between"):
            check_eps(eps)


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
