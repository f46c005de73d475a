from __future__ import annotations

from collections.abc import Callable
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from megapoly.config.options import OPTIONS
from megapoly.config.rules import RULES
from megapoly.config.rules.facts import Facts
from megapoly.config.schema import Config
from megapoly.platform.machine import CPU


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A folder with a pair of token files, half a pair and a tokenizer."""
    for name in ("tokens.bin", "tokens.idx", "half.bin", "tokenizer.json"):
        (tmp_path / name).touch()
    (tmp_path / "empty").mkdir()
    return tmp_path


@pytest.fixture
def facts_of(here: Path) -> Callable[[dict[str, Any]], Facts]:
    """Builds a run of 100 steps on one CPU with options, or fields of ``Facts``, set by name."""

    def build(settings: dict[str, Any]) -> Facts:
        facts = Facts(Config(), 1, CPU, 4096)
        for key, value in ({"training.train_iters": 100} | settings).items():
            value = _placed(value, here)
            if key not in OPTIONS:
                facts = replace(facts, **{key: value})
                continue
            section, _, name = key.rpartition(".")
            setattr(getattr(facts.config, section) if section else facts.config, name, value)
        return facts

    return build


@pytest.fixture
def assert_breaks_exactly(facts_of: Callable[[dict[str, Any]], Facts]) -> Callable[..., None]:
    """Asserts that ``base | right`` breaks no rule, and ``base | wrong`` one, with one message."""

    def check(
        *,
        rule: str,
        wrong: dict[str, Any],
        words: list[str],
        right: dict[str, Any] | None = None,
        base: dict[str, Any] | None = None,
    ) -> None:
        assert broken(facts_of((base or {}) | (right or {}))) == {}
        found = broken(facts_of((base or {}) | wrong))
        assert list(found) == [rule]
        (message,) = found[rule]
        for word in words:
            assert word in message

    return check


def broken(facts: Facts) -> dict[str, list[str]]:
    """Messages of every broken rule, by the rule's name."""
    found = {rule.__name__: list(rule(facts)) for rule in RULES}
    return {name: messages for name, messages in found.items() if messages}


def _placed(value: Any, here: Path) -> Any:
    """The value with HERE in its paths replaced."""
    if is_dataclass(value):
        return replace(value, **_placed(vars(value), here))
    if isinstance(value, dict):
        return {key: _placed(item, here) for key, item in value.items()}
    if isinstance(value, list):
        return [_placed(item, here) for item in value]
    return value.replace("HERE", str(here)) if isinstance(value, str) else value
