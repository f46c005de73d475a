import hashlib

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from token_data import pair_bytes, read_documents, usual_loop, write_jsonl

from megapoly.data.manifest import read_manifest
from megapoly.data.preprocess import merge, pair_writer
from megapoly.data.preprocess.merge import merge as merge_pairs
from megapoly.errors import DataError


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(pair_writer, "_BLOCK_BYTES", 100)
    monkeypatch.setattr(merge, "_AT_ONCE", 3)


def write_pair(prefix, documents: list[list[int]], dtype=np.uint16) -> None:
    """Documents of sequences of tokens of one value, by the engine."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for i, lengths in enumerate(documents):
        builder.add_document(np.full(sum(lengths), i + 1), lengths)
    builder.finalize(f"{prefix}.idx")


def test_the_bytes_are_those_of_one_run(run, tmp_path, texts):
    run(write_jsonl(tmp_path / "a.jsonl", texts[:30]), prefix="a")
    run(write_jsonl(tmp_path / "b.jsonl", texts[30:]), prefix="b")
    usual_loop(texts, tmp_path / "usual")
    prefixes = [tmp_path / "a_text_document", tmp_path / "b_text_document"]
    merge_pairs(prefixes, tmp_path / "both", overwrite=False)
    assert pair_bytes(tmp_path / "both") == pair_bytes(tmp_path / "usual")

    whole = run(write_jsonl(tmp_path / "c.jsonl", texts), prefix="c").manifest
    merged = read_manifest(tmp_path / "both.manifest.json")
    (pair,), (expected,) = merged.pairs, whole.pairs
    assert pair == type(expected)(**vars(expected) | {"name": "both"})
    assert merged.tokenizer == whole.tokenizer
    for source, prefix in zip(merged.sources, prefixes, strict=True):
        assert source.path == f"{prefix}.bin"
        assert source.sha256 == hashlib.sha256(pair_bytes(prefix)[0]).hexdigest()
    assert not list(tmp_path.glob("*.merge"))


def test_negative_ids_are_refused(tmp_path):
    write_pair(tmp_path / "a", [[3]], np.int16)
    builder = IndexedDatasetBuilder(str(tmp_path / "b.bin"), dtype=np.int16)
    builder.add_document(np.array([5, -7, 6]), [3])
    builder.finalize(str(tmp_path / "b.idx"))
    with pytest.raises(DataError, match=r"b.bin` holds -7 \(int16\)"):
        merge_pairs([tmp_path / "a", tmp_path / "b"], tmp_path / "both", overwrite=False)
    assert not (tmp_path / "both.bin").exists()


def test_pairs_of_any_origin(tmp_path):
    """Without manifest, with several sequences a document and with empty documents."""
    write_pair(tmp_path / "a", [[3, 2], [], [4], [], [1, 1, 1]])
    write_pair(tmp_path / "b", [[], [200]])
    prefixes = [tmp_path / "a", tmp_path / "b", tmp_path / "a"][:2]
    builder = IndexedDatasetBuilder(str(tmp_path / "engine.bin"), dtype=np.uint16)
    for prefix in prefixes:
        builder.add_index(str(prefix))
    builder.finalize(str(tmp_path / "engine.idx"))
    manifest = merge_pairs(prefixes, tmp_path / "both", overwrite=False)
    assert pair_bytes(tmp_path / "both") == pair_bytes(tmp_path / "engine")
    (pair,) = manifest.pairs
    lengths = [len(document) for document in read_documents(tmp_path / "both")]
    assert lengths == [5, 0, 4, 0, 3, 0, 200]
    assert (pair.documents, pair.sequences, pair.tokens) == (7, 7, sum(lengths))
    assert pair.tokens_per_document["max"] == 200 and pair.tokens_per_document["p50"] == 3
    assert (pair.highest_token_id, pair.eod_inside, manifest.tokenizer) == (5, -1, None)


def test_a_damaged_pair_is_noticed_and_nothing_is_written(run, tmp_path, texts):
    for name in ("a", "b"):
        run(write_jsonl(tmp_path / f"{name}.jsonl", texts[:20]), prefix=name)
    path = tmp_path / "b_text_document.bin"
    content = bytearray(path.read_bytes())
    content[77] ^= 1
    path.write_bytes(content)
    prefixes = [tmp_path / "a_text_document", tmp_path / "b_text_document"]
    with pytest.raises(DataError, match="b_text_document.bin` must have the SHA-256.*damaged"):
        merge_pairs(prefixes, tmp_path / "both", overwrite=False)
    assert not [path for path in tmp_path.glob("both*") if path.is_file()]


def test_what_does_not_fit_is_refused(run, tmp_path, texts):
    write_pair(tmp_path / "a", [[3]])
    write_pair(tmp_path / "wide", [[3]], np.int32)
    with pytest.raises(DataError, match="one type of token.*uint16.*int32"):
        merge_pairs([tmp_path / "a", tmp_path / "wide"], tmp_path / "out", overwrite=False)
    with pytest.raises(DataError, match="at least 2 pairs; it got 1"):
        merge_pairs([tmp_path / "a"], tmp_path / "out", overwrite=False)
    with pytest.raises(DataError, match="a.bin.*--overwrite"):
        merge_pairs([tmp_path / "wide"] * 2, tmp_path / "a", overwrite=False)
    with pytest.raises(DataError, match="input and output"):
        merge_pairs([tmp_path / "a", tmp_path / "a"], tmp_path / "a", overwrite=True)
    run(write_jsonl(tmp_path / "b.jsonl", texts[:9]), prefix="b")
    run(tmp_path / "b.jsonl", prefix="bare", append_eod=False)
    with pytest.raises(DataError, match="one tokenizer, used in one way"):
        prefixes = [tmp_path / "a", tmp_path / "b_text_document", tmp_path / "bare_text_document"]
        merge_pairs(prefixes, tmp_path / "out", overwrite=False)
    content = bytearray((tmp_path / "a.idx").read_bytes())
    content[-8:] = bytes(8)  # the last document does not end with the last sequence
    (tmp_path / "c.idx").write_bytes(content)
    (tmp_path / "c.bin").write_bytes((tmp_path / "a.bin").read_bytes())
    with pytest.raises(DataError, match=r"c.idx`: documents must reach from sequence 0 to 1"):
        merge_pairs([tmp_path / "a", tmp_path / "c"], tmp_path / "out", overwrite=False)
    manifest = tmp_path / "b.manifest.json"
    run(write_jsonl(tmp_path / "c.jsonl", texts[:9]), prefix="c")
    manifest.write_text(manifest.read_text().replace('"sha256": "', '"sha256": "0', 1))
    with pytest.raises(DataError, match="one tokenizer"):
        prefixes = [tmp_path / "b_text_document", tmp_path / "c_text_document"]
        merge_pairs(prefixes, tmp_path / "out", overwrite=False)
