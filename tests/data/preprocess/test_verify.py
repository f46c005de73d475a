import argparse
import json
import re
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from token_data import write_jsonl

from megapoly.data import index_file
from megapoly.data.preprocess import index_checks, verify
from megapoly.data.preprocess.pair_with_manifest import find_pairs
from megapoly.data.preprocess.verify import Expectations
from megapoly.data.preprocess.verify import verify as verify_pair
from megapoly.data.tokenizer import BUILTIN_TOKENIZER

HEADER = 34


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(verify, "_BLOCK_BYTES", 130)
    monkeypatch.setattr(index_checks, "_AT_ONCE", 7)
    monkeypatch.setattr(index_file, "_DOCUMENTS_AT_ONCE", 5)


@pytest.fixture
def pair(run, tmp_path, texts) -> Path:
    run(write_jsonl(tmp_path / "a.jsonl", texts[:40]))
    return tmp_path / "out_text_document"


def problems_of(pair_prefix: Path, **expected) -> list[str]:
    """Return the problems without those of the hashes, which find every change."""
    (described,) = find_pairs(pair_prefix)
    wanted = Expectations.of(described)
    for name, value in expected.items():
        setattr(wanted, name, value)
    report = verify_pair(described, wanted)
    return [p for p in report.problems if "SHA-256" not in p and "sha256" not in p]


def change(path: Path, place: int, value: int, dtype) -> None:
    """Overwrite a number in a file without changing its size."""
    content = bytearray(path.read_bytes())
    content[place : place + np.dtype(dtype).itemsize] = np.array(value, dtype).tobytes()
    path.write_bytes(content)


def test_a_pair_as_it_was_written_is_right(pair, texts):
    (described,) = find_pairs(pair)
    report = verify_pair(described, Expectations.of(described))
    assert report.problems == []
    assert report.found["index"] == "40 documents, 40 sequences"
    assert report.found["ends"].startswith("40 end with 0; ")
    assert described.record.bin_sha256 == report.found["hash of .bin"]
    # Also by the prefix of the manifest.
    assert [p.prefix for p in find_pairs(pair.with_name("out"))] == [pair]


@pytest.mark.parametrize("place", [0, 129, 4000, -2])
def test_a_flipped_bit_is_found(pair, place):
    path = pair.with_name("out_text_document.bin")
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    (described,) = find_pairs(pair)
    report = verify_pair(described, Expectations.of(described))
    assert "out_text_document.bin` must have the SHA-256 of its manifest" in report.problems[0]
    assert report.found["hash of .bin"].startswith("WRONG")


def test_each_damage_of_the_index_is_named(pair):
    path = pair.with_name("out_text_document.idx")
    intact = path.read_bytes()
    offsets = HEADER + 4 * 40
    bounds = offsets + 8 * 40
    first_length = int(np.frombuffer(intact, np.int32, 1, HEADER)[0])
    for place, value, dtype, message in (
        (HEADER + 4 * 9, 0, np.int32, "sequence 9 has 0 tokens"),
        (HEADER + 4 * 9, -3, np.int32, "sequence 9 has -3 tokens"),
        (offsets + 8, 4, np.int64, f"sequence 1 must begin at byte {2 * first_length}, .*at 4"),
        (bounds, 1, np.int64, r"must reach from sequence 0 to 40; they reach from \[1, 40\]"),
        (bounds + 8 * 40, 39, np.int64, r"they reach from \[0, 39\]"),
        (bounds + 8 * 20, 3, np.int64, "document 19 ends before it begins"),
    ):
        change(path, place, value, dtype)
        problems = problems_of(pair)
        assert any(re.search(message, problem) for problem in problems), problems
        path.write_bytes(intact)
    change(path, HEADER + 4 * 39, 5, np.int32)
    change(path, bounds + 8 * 20, 3, np.int64)
    other, problem = problems_of(pair)  # all problems, not only the first
    assert "document 19 ends" in other
    assert "as `" in problem and "truncated or belongs to another pair" in problem
    path.write_bytes(intact[:-8])
    (problem,) = problems_of(pair)
    assert "but its header describes" in problem
    path.unlink()
    (problem,) = problems_of(pair)
    assert "out_text_document.idx` is missing" in problem


def test_counts_are_compared_with_the_manifest(pair):
    path = pair.with_name("out.manifest.json")
    manifest = json.loads(path.read_text())
    for name, value in (("documents", 41), ("tokens", 7), ("dtype", "int32")):
        changed = json.loads(json.dumps(manifest))
        changed["pairs"][0][name] = value
        path.write_text(json.dumps(changed))
        (problem,) = problems_of(pair)
        assert f"must have the {name} of its manifest, {value}; it has" in problem
    manifest["pairs"][0]["eod_inside"] += 1
    path.write_text(json.dumps(manifest))
    (problem,) = problems_of(pair)
    assert "ends of document inside documents, as its manifest says" in problem


def write_pair(prefix: Path, documents: list[list[list[int]]], dtype=np.uint16) -> None:
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for sequences in documents:
        builder.add_document(sum(sequences, []), [len(sequence) for sequence in sequences])
    builder.finalize(f"{prefix}.idx")


def test_ids_and_boundaries_of_a_foreign_pair(tmp_path):
    """Several sequences a document, empty documents, no manifest."""
    documents = [[[7, 1, 5, 0]], [], [[7, 1, 2], [9, 0]], [[7, 1, 0]], [], [[7, 1, 0, 3, 0]]]
    write_pair(tmp_path / "x", documents)
    expected = {"vocab_size": 10, "eod": 0, "prefix": [7, 1]}
    assert problems_of(tmp_path / "x", **expected) == []
    (problem,) = problems_of(tmp_path / "x", **expected | {"vocab_size": 9})
    assert "0 or more and below 9; document 2 has 9 at token 3" in problem
    (problem,) = problems_of(tmp_path / "x", **expected | {"prefix": [7, 1, 5]})
    assert "must begin with [7, 1, 5]; document 2 does not" in problem

    documents[2][1][-1] = documents[5][0][-1] = 4
    write_pair(tmp_path / "x", documents)
    (problem,) = problems_of(tmp_path / "x", **expected)
    assert "must end with 0; 2 do not, the first is document 2" in problem
    (problem,) = problems_of(tmp_path / "x", vocab_size=10, eod=None, prefix=[7, 2])
    assert "must begin with [7, 2]" in problem

    documents = [[[7, 1, 0]]] * 8 + [[[7, 1, 3]], [[9, -3, 0]]]
    write_pair(tmp_path / "y", documents, np.int32)
    for vocab_size in (10, None):
        found = problems_of(tmp_path / "y", **expected | {"vocab_size": vocab_size})
        parts = ("document 9 has -3 at token 1", "first is document 8", "document 9 does not")
        for part, problem in zip(parts, found, strict=True):
            assert part in problem


def run_command(capsys, *args: str) -> tuple[int, str]:
    parser = argparse.ArgumentParser()
    verify.add_arguments(parser)
    status = verify.run(parser.parse_args(args))
    return status, capsys.readouterr().out


def test_the_command_says_what_it_could_not_compare(pair, tmp_path, capsys):
    write_pair(tmp_path / "x", [[[1, 2, 0]], [[3]]])
    status, output = run_command(capsys, str(pair), str(tmp_path / "x"))
    assert status == 0 and "no problems" in output
    assert "none: content cannot be compared with a hash" in output
    assert "no vocabulary to compare with" in output
    status, output = run_command(
        capsys, str(tmp_path / "x"), "--tokenizer-model", str(BUILTIN_TOKENIZER)
    )
    assert status == 1 and "1 do not, the first is document 1" in output
    assert "problems: 1" in output
    status, output = run_command(capsys, str(tmp_path / "x"), "--vocab-size", "3", "--quick")
    assert status == 0 and "token ids" not in output
    (tmp_path / "x.bin").unlink()
    status, output = run_command(capsys, str(tmp_path / "x"))
    assert status == 2 and "x.bin` is missing" in output
