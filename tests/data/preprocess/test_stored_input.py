"""Sub-commands take a pair in a store: what they say and write is that of the local files."""

import json
import shutil

import pytest
from token_data import write_jsonl

from megapoly.commands import preprocess


@pytest.fixture
def places(run, tmp_path, texts, monkeypatch):
    """Return the prefix of a pair on disk, and its URL."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    run(write_jsonl(tmp_path / "a.jsonl", texts))
    (tmp_path / "store").mkdir()
    for path in tmp_path.glob("out*"):
        shutil.copy(path, tmp_path / "store")
    return f"{tmp_path}/out_text_document", f"file://{tmp_path}/store/out_text_document"


def test_output_is_that_of_the_local_pair(places, tmp_path, capsys):
    for command in (["inspect", "--document", "0", "-1"], ["verify"]):
        printed = []
        for place in places:
            assert preprocess.main([command[0], place, *command[1:]]) == 0
            printed.append(capsys.readouterr().out)
        copy = f"{tmp_path}/cache/megapoly/stores/file{tmp_path}/store/out_text_document"
        assert printed[1].replace(copy, places[0]) == printed[0] != ""
    found = []
    for place in places:
        assert preprocess.main(["stats", place, "--json", str(tmp_path / "s.json")]) == 0
        (content,) = json.loads((tmp_path / "s.json").read_text())
        found.append(content | {"prefix": ""})
    assert found[0] == found[1]


def test_merged_bytes_are_those_of_local_pairs(places, tmp_path):
    local, url = places
    for name, pairs in (("x", [local, local]), ("y", [local, url])):
        assert preprocess.main(["merge", *pairs, "--output-prefix", f"{tmp_path}/{name}"]) == 0
    for ending in (".bin", ".idx"):
        x, y = (tmp_path / f"{name}{ending}" for name in "xy")
        assert x.read_bytes() == y.read_bytes()


def test_a_pair_that_is_not_there(places, capsys):
    assert preprocess.main(["stats", f"{places[1]}_absent"]) == 2
    assert "out_text_document_absent.bin: is not in the store" in capsys.readouterr().err
