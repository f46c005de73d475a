"""Each rule of data refuses a valid configuration with one change that breaks it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megapoly.config.rules import data, find_problems
from megapoly.config.rules.facts import Facts
from megapoly.config.schema import BlendSource, ValidationSet
from megapoly.platform.machine import CPU


def source(name: str = "tokens", **amount: Any) -> BlendSource:
    return BlendSource("HERE/tokens", name=name, **amount)


def blend(*sources: str | BlendSource) -> dict[str, Any]:
    return {"data.blend": list(sources)}


def validation(**sets: Any) -> dict[str, Any]:
    return {"data.validation": sets}


FILES = "HERE/tokens"
CASES: list[dict[str, Any]] = [
    dict(
        rule="blend_has_sources",
        wrong={"data.blend": []},
        words=["`data.blend` ([])", "leave it null"],
        right=blend(FILES),
    ),
    dict(
        rule="sources_have_one_amount",
        wrong=blend(source("a", weight=1.0, epochs=2.0)),
        words=["`data.blend` `a`", "exactly one of weight, tokens, epochs", "weight and epochs"],
        right=blend(source("a", weight=1.0)),
    ),
    dict(
        rule="sources_have_one_amount",
        wrong=blend(source("a")),
        words=["`data.blend` `a`", "not none", "`epochs: 1`"],
        right=blend(source("a", tokens=1)),
    ),
    dict(
        rule="sources_have_the_same_unit",
        wrong=blend(source("a", weight=1.0), source("b", tokens=5), FILES),
        words=[
            "weight (`a`)",
            "tokens (`b`)",
            "epochs (`tokens`)",
            "a prefix alone has `epochs: 1`",
        ],
        right=blend(source("a", epochs=0.5), source("b", epochs=5.0), FILES),
    ),
    dict(
        rule="amounts_are_in_range",
        wrong=blend(source("a", weight=-1.0), source("b", weight=2.0)),
        words=["`data.blend` `a` has weight -1.0", "above 0"],
        right=blend(source("a", weight=1.0), source("b", weight=2.0)),
    ),
    dict(
        rule="amounts_are_in_range",
        wrong=blend(source("a", tokens=0)),
        words=["`a` has tokens 0", "leave"],
    ),
    dict(
        rule="amounts_are_in_range",
        wrong=blend(source("a", epochs=1e9)),
        words=["`a` has epochs 1000000000.0", "above 0 and at most 1e+06"],
        right=blend(source("a", epochs=1e6)),
    ),
    dict(
        rule="shares_are_not_tiny",
        wrong=blend(source("a", weight=1e-9), source("b", weight=1.0)),
        words=["`a` has a share of 1.0e-09", "one sample in 1,048,576"],
        right=blend(source("a", weight=1e-5), source("b", weight=1.0)),
    ),
    dict(
        rule="source_names_differ",
        wrong=blend(FILES, source("b", epochs=1.0), source("tokens", epochs=1.0)),
        words=["2 sources of the name `tokens`", "its own `name`"],
        right=blend(FILES, source("b", epochs=1.0)),
    ),
    dict(
        rule="validation_has_sets",
        wrong={"data.validation": {}},
        words=["({})", "null"],
        right=validation(a=FILES),
    ),
    dict(
        rule="validation_names_are_free",
        wrong=validation(mean=FILES),
        words=["`mean`", "choose another"],
        right=validation(median=FILES),
    ),
    dict(
        rule="validation_weights_are_complete",
        wrong=validation(a=FILES, b=ValidationSet(FILES, 2.0), c=[FILES]),
        words=["all sets a weight or none", "`a`, `c` have none"],
        right=validation(a=ValidationSet([FILES], 1.0), b=ValidationSet(FILES, 2.0)),
    ),
    dict(
        rule="validation_weights_are_complete",
        wrong=validation(a=ValidationSet(FILES, 0.0)),
        words=["`a` has weight 0.0", "above 0"],
    ),
    dict(
        rule="token_files_exist",
        wrong=blend("HERE/tokens", "HERE/absent"),
        words=["`data.blend` `absent`", "absent.bin", "absent.idx"],
        right=blend("HERE/tokens"),
    ),
    dict(
        rule="token_files_exist",
        wrong=blend("HERE/*_text_document"),
        words=["no file matches", "/*_text_document.idx"],
        right=blend("HERE/tok*"),
    ),
    dict(
        rule="token_files_exist",
        wrong=validation(wiki=["HERE/half"]),
        words=["`data.validation` `wiki`", "half.idx"],
        right=validation(wiki=["HERE/t*"]),
    ),
    dict(
        rule="token_files_exist",
        wrong=blend("oss://bucket/tokens"),
        words=["`data.blend` `tokens`", "(oss://bucket/tokens)", "pip install ossfs"],
        right=blend("file:///absent/tokens"),  # looked for when the data is opened
    ),
    dict(
        rule="token_files_exist",
        wrong=validation(wiki=ValidationSet([])),
        words=["`data.validation` `wiki` ([])", "prefix"],
    ),
    dict(
        rule="tokenizer_exists",
        wrong={"data.tokenizer": "HERE/absent.json"},
        words=["absent.json", "built-in"],
        right={"data.tokenizer": "HERE/tokenizer.json"},
    ),
    dict(
        rule="tokenizer_exists",
        wrong={"data.tokenizer": "HERE/empty"},
        words=["empty/tokenizer.json"],
        right={"data.tokenizer": "HERE"},
    ),
    dict(
        rule="evaluation_has_data",
        wrong=blend(FILES) | {"training.eval_interval": 5},
        words=["(5)", "`data.validation` (null)"],
        right=blend(FILES) | validation(a=FILES) | {"training.eval_interval": 5},
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["rule"])
def test_breaks_exactly_its_rule(
    case: dict[str, Any], assert_breaks_exactly: Callable[..., None]
) -> None:
    assert_breaks_exactly(**case)


def test_every_rule_has_a_case() -> None:
    assert {case["rule"] for case in CASES} == {rule.__name__ for rule in data.RULES}


def test_all_mistakes_are_reported_together(facts_of: Callable[[dict[str, Any]], Facts]) -> None:
    sources = blend("HERE/absent", source("a", weight=-1.0), source("a", weight=1.0))
    facts = facts_of(sources | validation(mean=["HERE/no*"], b=ValidationSet([], 1.0)))
    found = find_problems(facts.config, world_size=1, machine=CPU)
    # Units, amount, name twice, absent file; a name that is taken, weights, pattern, empty list.
    assert len(found) == 8


def test_a_prefix_with_the_letters_of_a_pattern_is_itself(tmp_path: Path) -> None:
    for name in ("a[1]", "a1", "b2", "b10"):
        (tmp_path / f"{name}.idx").touch()
    prefixes = data.token_file_prefixes
    assert prefixes(f"{tmp_path}/a[1]") == [f"{tmp_path}/a[1]"]
    assert prefixes(f"{tmp_path}/b*") == [f"{tmp_path}/b10", f"{tmp_path}/b2"]
    assert prefixes(f"{tmp_path}/c*") == []
    assert prefixes(f"{tmp_path}/absent") == [f"{tmp_path}/absent"]
