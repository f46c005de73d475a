"""The command: its exit status, what it prints, what it refuses."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from small_jobs import small_job

from megapoly.commands import soak
from megapoly.testing.soak.kinds import KINDS
from megapoly.testing.soak.loop import Outcome, Soak


def test_kinds() -> None:
    assert soak.KINDS == (*KINDS,)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--checkpoint.save_interval", "0"], "set `checkpoint.save_interval` above 0"),
        (["--checkpoint.keep", "1"], "flip and truncate needs a second checkpoint"),
        (["--output", "."], "`--output` (.) must be an empty or a new folder"),
        (
            ["--training.spike_action", "skip", "--training.train_iters", "null"],
            "needs `training.train_iters`",
        ),
    ],
)
def test_is_refused(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert soak.main([*small_job(), "--output", str(tmp_path / "soak"), *words]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_table_and_a_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("COLUMNS", "100")
    report = tmp_path / "report.json"
    words = ["--faults", "2", "--kinds", "job", "--output", str(tmp_path / "soak")]
    assert soak.main([*small_job(), *words, "--json", str(report)]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if "│" in line]
    assert [row[:4] for row in rows] == [
        ["launcher and all ranks are killed", "2", "2", "0"],
        ["every fault", "2", "2", "0"],
        ["a complete run equals the uninterrupted one", "1", "1", "0"],
    ]
    content = json.loads(report.read_text())
    assert [each["kind"] for each in content["outcomes"]] == ["job", "job", None]
    assert content["seed"] == 0 and not any(each["problem"] for each in content["outcomes"])


def test_a_soak_that_is_stopped_prints_what_it_has_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def outcomes(soak: Soak) -> Iterator[Outcome]:
        yield Outcome("stop", "run_0001", tmp_path / "log", 1.5, "a problem")
        raise KeyboardInterrupt

    monkeypatch.setattr(Soak, "outcomes", outcomes)
    with pytest.raises(KeyboardInterrupt):
        soak.main([*small_job(), "--output", str(tmp_path / "soak")])
    printed = capsys.readouterr().out
    assert "lost: a rank is stopped (SIGSTOP), run_0001: a problem" in printed
    row = next(line for line in printed.splitlines() if "a rank is stopped" in line)
    assert [cell.strip() for cell in row.split("│")[2:-1]] == ["1", "0", "1", "1.5"]


def test_a_job_that_fails_without_a_fault(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--output", str(tmp_path / "soak"), "--new-processes", "--model.num_layers", "0"]
    assert soak.main([*small_job(), *words]) == 2
    assert "`model.num_layers` (0)" in capsys.readouterr().err
