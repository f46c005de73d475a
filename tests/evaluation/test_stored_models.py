"""Commands take a run or checkpoint in a store: the same results as from its folder."""

from __future__ import annotations

import json
import shutil

import pytest
from evaluation_jobs import evaluate_with_cache

from megapoly.checkpoints import object_store
from megapoly.checkpoints.local_copy import local_model
from megapoly.commands import analyze, export, generate
from megapoly.errors import CheckpointError
from megapoly.platform import stores
from megapoly.testing import run_on_ranks


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/megapoly"


@pytest.fixture
def url(trained, tmp_path):
    url = f"file://{tmp_path}/store/run"
    object_store.upload(trained("dense")[0], url)
    return url


def test_text_and_exports_are_those_of_the_folder(url, cache, trained, tmp_path, capsys):
    checkpoint, _ = trained("dense")
    printed = []
    for model in (str(checkpoint), url, f"{url}/checkpoints/{checkpoint.name}"):
        args = ["--model", model, "--max-new-tokens", "8", "--temperature", "0"]
        assert generate.main(args) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] == printed[2] != ""
    weights = []
    for name, model in (("a", str(checkpoint)), ("b", url)):
        assert export.main(["--model", model, "--output", str(tmp_path / name)]) == 0
        weights.append((tmp_path / name / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]
    (copy,) = cache.rglob("iter_*")
    assert copy.name == checkpoint.name


def test_analyses_need_a_folder_to_write_to(url, cache, tmp_path, capsys):
    args = ["--model", url, "--parts", "rank", "coefficients"]
    assert analyze.main(args) == 2
    assert "is no folder to write to; add --output DIR" in capsys.readouterr().err
    assert analyze.main([*args, "--output", str(tmp_path / "out")]) == 0
    content = json.loads((tmp_path / "out/analysis.json").read_text())
    assert content["effective_rank"] and content["iteration"] == 3
    assert content["checkpoint"].startswith(str(cache))


def test_figures_of_two_processes(url, cache, trained, task_data, tmp_path):
    checkpoint, _ = trained("dense")
    found = []
    for name, model in (("a", str(checkpoint)), ("b", url)):
        output = tmp_path / f"{name}.json"
        args = ["--model", model, "--tasks", "piqa", "--task-data", str(task_data)]
        args += ["--output", str(output)]
        first, second = run_on_ranks(evaluate_with_cache, 2, str(cache.parent), args)
        assert first[0] == second[0] == 0, first
        found.append(json.loads(output.read_text()))
    assert found[0]["tasks"] == found[1]["tasks"]
    (copy,) = cache.rglob("iter_*")
    assert found[1]["model"]["path"] == str(copy)


def test_what_is_wrong_is_said(url, cache, tmp_path, monkeypatch, capsys):
    assert generate.main(["--model", f"{url}/absent"]) == 2
    assert "has no complete checkpoint" in capsys.readouterr().err
    assert generate.main(["--model", "oss://bucket/run"]) == 2
    assert "needs ossfs: pip install ossfs" in capsys.readouterr().err
    monkeypatch.setattr(stores, "LOCK_LIMIT_S", -1.0)
    with (
        stores.sole_process(object_store.run_folder_of(url, cache / "stores"), CheckpointError),
        pytest.raises(CheckpointError, match="another process has copied"),
    ):
        local_model(url)
    shutil.rmtree(tmp_path / "store")
    assert generate.main(["--model", url]) == 2
