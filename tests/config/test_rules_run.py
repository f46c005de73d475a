"""Each rule of run has cases that break it alone, beside a configuration that is right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from megapoly.config.rules import run

CASES: list[dict[str, Any]] = [
    dict(
        rule="device_exists",
        wrong={"training.device": "cuda"},
        words=["(cuda)", "set cpu"],
        right={"training.device": "cuda", "cuda_available": True},
    ),
    dict(
        rule="transformer_engine_is_usable",
        wrong={"model.transformer_engine": True, "cuda_available": True},
        words=["pip install '.[gpu]'"],
        right={
            "model.transformer_engine": True,
            "cuda_available": True,
            "transformer_engine_available": True,
        },
    ),
    dict(
        rule="transformer_engine_is_usable",
        wrong={"model.transformer_engine": True, "transformer_engine_available": True},
        words=["cuda, not cpu"],
        right={"model.transformer_engine": False},
    ),
    dict(
        rule="token_files_exist",
        wrong={"data.train_data_path": ["HERE/tokens", "HERE/absent"]},
        words=["`data.train_data_path`", "absent.bin", "absent.idx"],
        right={"data.train_data_path": ["HERE/tokens"]},
    ),
    dict(
        rule="token_files_exist",
        wrong={"data.valid_data_path": {"wiki": ["HERE/half"]}},
        words=["`data.valid_data_path` `wiki`", "half.idx"],
        right={"data.valid_data_path": {"wiki": ["HERE/tokens"]}},
    ),
    dict(rule="token_files_exist", wrong={"data.train_data_path": []}, words=["([])", "prefix"]),
    dict(rule="token_files_exist", wrong={"data.valid_data_path": {}}, words=["({})", "null"]),
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
        wrong={"data.train_data_path": ["HERE/tokens"], "training.eval_interval": 5},
        words=["(5)", "`data.valid_data_path` (null)"],
        right={
            "data.train_data_path": ["HERE/tokens"],
            "data.valid_data_path": {"a": ["HERE/tokens"]},
            "training.eval_interval": 5,
        },
    ),
    dict(
        rule="loading_is_possible",
        wrong={"checkpoint.load_weights_only": True},
        words=["(True)", "`checkpoint.load` (null)"],
        right={"checkpoint.load_weights_only": True, "checkpoint.load": "HERE"},
    ),
    dict(
        rule="loading_is_possible",
        wrong={"checkpoint.load": "HERE/absent"},
        words=["absent", "does not exist"],
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["rule"])
def test_breaks_exactly_its_rule(
    case: dict[str, Any], assert_breaks_exactly: Callable[..., None]
) -> None:
    assert_breaks_exactly(**case)


def test_every_rule_has_a_case() -> None:
    assert {case["rule"] for case in CASES} == {rule.__name__ for rule in run.RULES}
