"""Each rule of exports refuses a valid configuration with one change that breaks it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megapoly.config.exports import parsed_export
from megapoly.config.rules import exports
from megapoly.config.rules.facts import Facts
from megapoly.platform import extras

PLACE = "exports_are_possible"


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("", "must begin with `prometheus:` and a path, or with `otlp:` and a URL"),
        ("statsd:localhost", "(statsd:localhost) must begin with `prometheus:`"),
        ("prometheus:/tmp/a.txt", "must be a file whose name ends with .prom"),
        ("prometheus:http://a/b.prom", "must be a file whose name ends with .prom"),
        ("otlp:localhost:4318", "must be a URL such as otlp:http://HOST:4318"),
        ("otlp:http://", "must be a URL such as"),
        ("otlp:http://host:port", "must be a URL such as"),
        ("otlp:grpc://host:4317", "must be a URL such as"),
    ],
)
def test_an_entry_that_is_none(
    assert_breaks_exactly: Callable[..., None], entry: str, words: str
) -> None:
    assert_breaks_exactly(rule=PLACE, wrong={"logging.export": [entry]}, words=[words])


def test_an_entry_that_is_there_twice(assert_breaks_exactly: Callable[..., None]) -> None:
    right = ["otlp:http://a:4318", "otlp:https://b/otlp"]
    assert_breaks_exactly(
        rule=PLACE,
        wrong={"logging.export": ["otlp:http://a:4318"] * 2},
        words=["has otlp:http://a:4318 more than once"],
        right={"logging.export": right},
    )


def test_a_package_that_is_missing(
    facts_of: Callable[[dict[str, Any]], Facts], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(extras, "missing", list)
    facts = facts_of({"logging.export": ["otlp:http://a:4318", f"prometheus:{tmp_path}/a.prom"]})
    otlp, prometheus = exports.exports_are_possible(facts)
    assert otlp.endswith(
        "needs opentelemetry-sdk and opentelemetry-exporter-otlp-proto-http: "
        "pip install 'megapoly[watch]'"
    )
    assert "needs prometheus-client: pip install 'megapoly[watch]'" in prometheus


def test_a_folder_that_is_missing(
    facts_of: Callable[[dict[str, Any]], Facts], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    facts = facts_of({"logging.export": [f"prometheus:{tmp_path}/none/a.prom"]})
    (message,) = exports.folders_of_exports_exist(facts)
    assert f"{tmp_path}/none is no folder" in message and "--collector.textfile" in message
    monkeypatch.setenv("RANK", "1")
    assert not list(exports.folders_of_exports_exist(facts))  # only rank 0 writes it
    monkeypatch.delenv("RANK")
    (tmp_path / "none").mkdir()
    assert not list(exports.folders_of_exports_exist(facts))


@pytest.mark.parametrize(
    ("entry", "url"),
    [
        ("otlp:http://a:4318", "http://a:4318/v1/metrics"),
        ("otlp:https://a/otlp/", "https://a/otlp/v1/metrics"),
        ("otlp:http://a/v1/metrics", "http://a/v1/metrics"),
    ],
)
def test_url_of_a_collector(entry: str, url: str) -> None:
    assert parsed_export(entry).metrics_url == url
