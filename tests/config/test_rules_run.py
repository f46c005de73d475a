"""Each rule of run refuses a valid configuration with one change that breaks it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megapoly.config.rules import run
from megapoly.config.rules.facts import Facts
from megapoly.platform.machine import Machine

GPU = Machine(cuda=True)
GPU_WITH_TE = Machine(cuda=True, transformer_engine=True)
CASES: list[dict[str, Any]] = [
    dict(
        rule="device_exists",
        wrong={"training.device": "cuda"},
        words=["(cuda)", "set cpu"],
        right={"training.device": "cuda", "machine": GPU},
    ),
    dict(
        rule="transformer_engine_is_usable",
        wrong={"model.transformer_engine": True, "machine": GPU},
        words=["pip install 'megapoly[gpu]'"],
        right={"model.transformer_engine": True, "machine": GPU_WITH_TE},
    ),
    dict(
        rule="transformer_engine_is_usable",
        wrong={"model.transformer_engine": True, "machine": Machine(transformer_engine=True)},
        words=["cuda, not cpu"],
        right={"model.transformer_engine": False},
    ),
    dict(
        rule="hang_is_seen_before_collectives_fail",
        wrong={"parallel.hang_timeout_s": 481.0, "world_size": 2},
        words=["`parallel.hang_timeout_s` (481)", "at most 80 %", "480 s", "raise the second"],
        right={"parallel.hang_timeout_s": 480.0, "world_size": 2},
    ),
    dict(
        rule="hang_is_seen_before_collectives_fail",
        wrong={"parallel.hang_timeout_s": 49.0, "world_size": 2}
        | {"parallel.distributed_timeout_minutes": 1.0},
        words=["(1), 48 s"],
        right={"parallel.hang_timeout_s": 481.0, "world_size": 1},
    ),
    dict(
        rule="loading_is_possible",
        wrong={"checkpoint.load_weights_only": True},
        words=["(True)", "`checkpoint.load` (null)"],
        right={"checkpoint.load_weights_only": True, "checkpoint.load": "HERE"},
    ),
    dict(
        rule="upload_is_possible",
        wrong={"checkpoint.upload": "bucket/run"},
        words=["`checkpoint.upload` (bucket/run)", "must be a URL"],
        right={"checkpoint.upload": "s3://bucket/run"},
    ),
    dict(
        rule="upload_is_possible",
        wrong={"checkpoint.upload": "s3://bucket/run", "checkpoint.save": False},
        words=["has no effect", "`checkpoint.save` (False)"],
        right={"checkpoint.upload": "s3://bucket/run"},
    ),
    dict(
        rule="upload_is_possible",
        wrong={"checkpoint.upload": "s3://bucket/run", "checkpoint.keep": 1},
        words=["`checkpoint.keep` other than 1", "2 is the lowest"],
        right={"checkpoint.upload": "s3://bucket/run", "checkpoint.keep": 2},
    ),
    dict(
        rule="checkpoint_exists",
        wrong={"checkpoint.load": "HERE/absent"},
        words=["absent", "does not exist"],
    ),
    dict(
        rule="loading_is_possible",
        wrong={"checkpoint.accept_other_data": True, "checkpoint.resume": False},
        words=["`checkpoint.accept_other_data` (True)", "has no effect", "(False)", "remove it"],
        right={"checkpoint.accept_other_data": True},
    ),
    dict(
        rule="loading_is_possible",
        wrong={"checkpoint.accept_other_batch": True, "checkpoint.resume": False},
        words=["`checkpoint.accept_other_batch` (True)", "has no effect", "(False)", "remove it"],
        right={"checkpoint.accept_other_batch": True},
    ),
    dict(
        rule="checkpoint_exists",
        wrong={"checkpoint.load": "oss://bucket/run"},
        words=["(oss://bucket/run)", "pip install ossfs"],
        right={"checkpoint.load": "file:///absent/run"},  # looked for when the run starts
    ),
    dict(
        rule="upload_is_possible",
        wrong={"checkpoint.upload": "oss://bucket/run"},
        words=["(oss://bucket/run)", "pip install ossfs"],
    ),
    dict(
        rule="folders_can_be_made",
        wrong={"run_dir": "s3://bucket/run"},
        words=[
            "`run_dir` (s3://bucket/run)",
            "not a URL",
            "`checkpoint.upload` to s3://bucket/run",
        ],
    ),
    dict(
        rule="checkpoint_exists",
        wrong={"checkpoint.load": "HERE/tokens.bin"},
        words=["tokens.bin", "is not a folder"],
    ),
    dict(
        rule="folders_can_be_made",
        wrong={"run_dir": "HERE/tokens.bin"},
        words=["`run_dir`", "tokens.bin) is not a folder; choose another"],
        right={"run_dir": "HERE/empty"},
    ),
    dict(
        rule="folders_can_be_made",
        wrong={"data.cache_dir": "HERE/tokens.bin/a/b"},
        words=["`data.cache_dir`", "/a/b) cannot be made: ", "tokens.bin is not a folder"],
        right={"data.cache_dir": "HERE/empty/a/b"},
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["rule"])
def test_breaks_exactly_its_rule(
    case: dict[str, Any], assert_breaks_exactly: Callable[..., None]
) -> None:
    assert_breaks_exactly(**case)


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("link", "cannot be opened (Too many levels of symbolic links)"),
        ("absent", "is a link to nothing"),
        ("a" * 300, "cannot be opened (File name too long)"),
    ],
)
def test_links_that_lead_to_no_folder(
    tmp_path: Path, facts_of: Callable[..., Facts], target: str, reason: str
) -> None:
    (tmp_path / "link").symlink_to(target)
    (problem,) = run.folders_can_be_made(facts_of({"run_dir": str(tmp_path / "link")}))
    assert reason in problem
    assert list(run.folders_can_be_made(facts_of({"run_dir": str(tmp_path / "other/a")}))) == []


def test_every_rule_has_a_case() -> None:
    assert {case["rule"] for case in CASES} == {rule.__name__ for rule in run.RULES}
