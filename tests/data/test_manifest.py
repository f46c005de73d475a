import json
from dataclasses import replace

import pytest

from megapoly.data.manifest import (
    Manifest,
    PairRecord,
    RejectedRecord,
    SourceRecord,
    TokenizerRecord,
    find_manifest,
    manifest_path,
    read_manifest,
    write_manifest,
)
from megapoly.errors import DataError


def make_manifest(*names: str) -> Manifest:
    pairs = [
        PairRecord(name, "uint16", 2, 2, 9, 77, 0, {"min": 4.0}, 18, "a" * 64, 99, "b" * 64)
        for name in names
    ]
    return Manifest(
        1,
        "0.1",
        TokenizerRecord("HuggingFaceTokenizer", "t.json", "c" * 64, 100, 0, True, [1], [], "x 1"),
        {"input": ["é"]},
        [SourceRecord("é.jsonl", "jsonl", 10, "d" * 64, 2, 0)],
        pairs,
        RejectedRecord("fail"),
    )


def test_a_manifest_reads_back_as_it_was_written(tmp_path):
    manifest = make_manifest("x_text_document")
    path = write_manifest(tmp_path / "x", manifest)
    assert path == tmp_path / "x.manifest.json"
    assert read_manifest(path) == manifest
    assert json.loads(path.read_text())["pairs"][0]["tokens"] == 9
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("prefix", ["x", "a_b", "a_b_c"])
def test_a_pair_finds_the_manifest_that_names_it(tmp_path, prefix):
    name = f"{prefix}_my_text_document"
    assert find_manifest(tmp_path / name) is None
    write_manifest(tmp_path / prefix.split("_")[0], make_manifest("other"))
    write_manifest(tmp_path / prefix, make_manifest("other", name))
    assert find_manifest(tmp_path / name) == manifest_path(tmp_path / prefix)
    assert find_manifest(tmp_path / f"{name}s") is None


def test_what_is_no_manifest_is_refused(tmp_path):
    path = write_manifest(tmp_path / "x", replace(make_manifest(), format_version=2))
    with pytest.raises(DataError, match="format version 2.*reads 1"):
        read_manifest(path)
    for text in ("", "[]", '{"format_version": 1}'):
        path.write_text(text)
        with pytest.raises(DataError, match="not a valid manifest.*delete it"):
            read_manifest(path)
