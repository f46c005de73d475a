import json
from dataclasses import replace
from pathlib import Path

import pytest

from megapoly.study.analysis.command import AnalysisError, AnalysisRequest, analyze, of_comparisons


def comparison(folder: Path, chosen: dict[str, str]) -> Path:
    folder.mkdir()
    (folder / "comparison.json").write_text(
        json.dumps({"commands": [], "trials": {}, "chosen": chosen})
    )
    return folder


def test_chosen_runs_without_these_parts_are_requested(tmp_path: Path) -> None:
    dense = comparison(tmp_path / "dense", {"swiglu": "s.1", "gelu": "g.1", "relu": "r.1"})
    moe = comparison(tmp_path / "moe", {"swiglu": "m.1"})
    for name, parts in (("s.1", ["rank", "similarity"]), ("g.1", ["similarity"])):
        (dense / name / "analysis").mkdir(parents=True)
        written = dense / name / "analysis/analysis.json"
        asked = {"tokens": 64, "options": []}
        written.write_text(json.dumps({"parts": parts, "asked": asked}))
    (dense / "r.1/analysis").mkdir(parents=True)
    (dense / "r.1/analysis/analysis.json").write_text('{"parts": ["ra')  # of a full disk
    request = AnalysisRequest(None, parts=("rank",), tokens=64, overrides=("--data.seed", "3"))
    found = of_comparisons(request, [dense, moe])
    assert [each.checkpoint for each in found] == [dense / "g.1", dense / "r.1", moe / "m.1"]
    assert found[2].command == (
        f"megapoly analyze --model {moe / 'm.1'} --parts rank --tokens 64 --data.seed 3"
    )
    assert {each.parts for each in found} == {("rank",)}


def test_another_text_is_another_analysis(tmp_path: Path) -> None:
    dense = comparison(tmp_path / "dense", {"swiglu": "s.1"})
    (dense / "s.1/analysis").mkdir(parents=True)
    content = {"parts": ["rank", "similarity"], "asked": {"tokens": 64, "options": []}}
    (dense / "s.1/analysis/analysis.json").write_text(json.dumps(content))
    similarity = AnalysisRequest(None, parts=("similarity",), tokens=64)
    assert of_comparisons(similarity, [dense]) == []
    for other in ({"tokens": 65}, {"overrides": ("--data.validation={}",)}):
        assert len(of_comparisons(replace(similarity, **other), [dense])) == 1
    # Which the rank is not of.
    assert of_comparisons(replace(similarity, parts=("rank",), tokens=65), [dense]) == []
    with pytest.raises(AnalysisError, match=r"has an analysis that includes rank.*--output"):
        analyze(replace(similarity, checkpoint=_run(dense / "s.1"), tokens=65))


def _run(folder: Path) -> Path:
    """With what passes for a complete checkpoint."""
    checkpoint = folder / "checkpoints/iter_0000005"
    checkpoint.mkdir(parents=True)
    (checkpoint / "run.json").write_text("{}")
    return folder


def test_a_comparison_whose_rates_are_not_chosen_is_refused(tmp_path: Path) -> None:
    folder = comparison(tmp_path / "dense", {})
    with pytest.raises(AnalysisError, match="let megapoly compare finish there"):
        of_comparisons(AnalysisRequest(None), [folder])
    with pytest.raises(AnalysisError, match="must be the folder of a comparison"):
        of_comparisons(AnalysisRequest(None), [tmp_path])
