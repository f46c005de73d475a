import json
from pathlib import Path

import pytest

from megapoly.analysis.command import AnalysisError, Asked, of_comparisons


def comparison(folder: Path, chosen: dict[str, str]) -> Path:
    folder.mkdir()
    (folder / "comparison.json").write_text(
        json.dumps({"wall_time_s": 1.0, "trials": {}, "chosen": chosen})
    )
    return folder


def test_chosen_runs_without_these_parts_are_asked_for(tmp_path: Path) -> None:
    dense = comparison(tmp_path / "dense", {"swiglu": "s.1", "gelu": "g.1", "relu": "r.1"})
    moe = comparison(tmp_path / "moe", {"swiglu": "m.1"})
    for name, parts in (("s.1", ["rank", "similarity"]), ("g.1", ["similarity"])):
        (dense / name / "analysis").mkdir(parents=True)
        written = dense / name / "analysis/analysis.json"
        written.write_text(json.dumps({"parts": parts}))
    (dense / "r.1/analysis").mkdir(parents=True)
    (dense / "r.1/analysis/analysis.json").write_text('{"parts": ["ra')  # of a full disk
    asked = Asked(None, parts=("rank",), tokens=64, words=("--data.seed", "3"))
    found = of_comparisons(asked, [dense, moe])
    assert [each.checkpoint for each in found] == [dense / "g.1", dense / "r.1", moe / "m.1"]
    assert found[2].command == (
        f"python tools/analyze.py --checkpoint {moe / 'm.1'} --parts rank --tokens 64 --data.seed 3"
    )
    assert {each.parts for each in found} == {("rank",)}


def test_a_comparison_whose_rates_are_not_chosen_is_refused(tmp_path: Path) -> None:
    folder = comparison(tmp_path / "dense", {})
    with pytest.raises(AnalysisError, match="let tools/compare_activations.py finish there"):
        of_comparisons(Asked(None), [folder])
    with pytest.raises(AnalysisError, match="must be the folder of a comparison"):
        of_comparisons(Asked(None), [tmp_path])
