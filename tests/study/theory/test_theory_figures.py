import importlib.util
import json
from pathlib import Path

import pytest

from megapoly.commands import theory as command


def test_every_statement_is_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "EXPONENTS", [1, 5, 8])
    monkeypatch.setattr(command, "TOLERANCES", [1e-1, 1e-2, 1e-3])
    cells = dict.fromkeys(command.CELLS, (2, 4, 6)) | {(2, "ReLU"): (2, 4, 5)}
    monkeypatch.setattr(command, "CELLS", cells)
    smoothness = {key: (1, 2) if key[0] == 1 else (1,) for key in cells}
    monkeypatch.setattr(command, "SMOOTHNESS", smoothness)
    assert command.main(["--output", str(tmp_path / "made")]) == 0
    report = json.loads((tmp_path / "made/theory.json").read_text())
    names = {"theorem_1", "lemma_a4", "lemma_2", "theorem_2", "theorem_3"}
    assert {file.stem for file in (tmp_path / "made").glob("*.png")} == names
    for name in names:
        assert (tmp_path / f"made/{name}.png").read_bytes().startswith(b"\x89PNG")
        assert report[name]
    assert all(result["exact"] for result in report["lemma_a4"])
    assert [result["largest_difference"] for result in report["theorem_1"]] == [0] * 9
    assert len(report["fits"]["theorem_3"]) == 10


def test_missing_matplotlib_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert command.main(["--output", str(tmp_path)]) == 2
    assert "needs matplotlib: pip install 'megapoly[report]'" in capsys.readouterr().err


def test_folder_that_cannot_be_made(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert command.main(["--output", str(tmp_path / "file")]) == 2
    assert "file" in capsys.readouterr().err
